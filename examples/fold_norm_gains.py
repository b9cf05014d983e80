"""A pass in a file of its own.

graphopt compile demo -o out --plugin examples/fold_norm_gains.py --passes fold-norm-gains
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch

import graphopt as go
from graphopt.ir import resolve_attrs


@go.register_pass
@dataclass
class FoldNormGains(go.Pass):
    """Multiply the gain of each RMS norm into the matrices behind it.

    A norm multiplies every channel by a gain, and the matrix behind it every channel by a column.
    With the columns times the gain, and a gain of 1 in its place, the same comes out. Methods that
    rotate the channels, such as QuaRot (arXiv 2404.00456, section 4), begin with this.

    Legality:

    1. Matrices alone read what the norm gives.
    2. No other place of the model reads such a matrix, nor the gain.
    3. The matrices are stored in fp32: codes and 16-bit numbers would round the products.
    """

    name: ClassVar[str] = "fold-norm-gains"
    reads_weights: ClassVar[bool] = True

    def run(self, program: go.Program, context: go.Context) -> go.PassResult:
        result = go.PassResult(program)
        readers = Counter(name for call in program.calls for name in call.weights.values())
        # Layers share a function, and each call of it has weights of its own.
        for number, call in enumerate(program.calls):
            function = program.function_of(call)
            slots = function.slots_by_value()
            for node in function.nodes:
                if node.op != "rms_norm" or node.operand(1) not in slots:
                    continue
                gain = program.weights[call.weights[slots[node.operand(1)]]]
                # Gemma adds 1 to what it stores of a gain.
                offset = resolve_attrs(node, call).get("offset", 0.0)
                channels = gain.load(torch.float32) + offset
                if bool((channels == 1).all()):
                    continue  # there is nothing to fold, or it was folded before
                result.matched += 1
                matrices = self._matrices(program, call, function, node, readers)
                if isinstance(matrices, str):
                    result.skipped.append(go.Skip(gain.name, matrices))
                    continue
                for matrix in matrices:
                    folded = go.Array(matrix.load() * channels)
                    program.weights.replace(matrix.with_producer(folded))
                ones = go.Array(torch.full_like(gain.load(), 1.0 - offset))
                program.weights.replace(gain.with_producer(ones))
                result.changed += 1
            context.progress(self.name, number + 1, len(program.calls))
        return result

    @staticmethod
    def _matrices(
        program: go.Program,
        call: go.Call,
        function: go.Function,
        norm: go.Node,
        readers: Counter[str],
    ) -> list[go.Weight] | str:
        """Return the matrices that a norm's gain goes into, or why it can't."""
        slots, uses = function.slots_by_value(), function.uses()
        places = uses[norm.output]
        if norm.output in function.outside_values() or any(
            node.op != "linear" or index != 0 for node, index in places
        ):
            return "something else than a matrix reads the norm's result"
        read = [node.operand(1) for node, _ in places]
        if any(value not in slots for value in read):
            return "a matrix behind it is computed, not stored"
        matrices = [program.weights[call.weights[slots[value]]] for value in read]
        gain = norm.operand(1)
        for value, weight in zip([gain, *read], [None, *matrices], strict=True):
            name = call.weights[slots[value]]
            if readers[name] > 1 or len(uses[value]) > 1:
                return f"{name} is read in another place of the model too"
            if weight is not None and (weight.dtype != torch.float32 or weight.encoding):
                return f"{name} is not stored in fp32, and would round the products"
        return matrices
