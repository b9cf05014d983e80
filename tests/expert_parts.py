"""Feed-forward parts of random experts, emitted to ONNX and compared with the op."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import torch
from programs import IDS

from graphopt.ir import Array, B, Call, Function, Program, S, Type, Value, Weight
from graphopt.ir.ops import get_op
from graphopt.lowering.onnx import OnnxEmitter
from graphopt.support.progress import silent

WIDTH, OUT, NEURONS = 40, 24, 12
"""Of x, of what comes out, and of an expert: its matrices lie in the data file."""

SPLITS = {
    "S3A3E8": (5, 3),
    "S2A2E16": (14, 2),
    "S0A2E8": (8, 2),
    "S7A1E8": (1, 1),
    "S4A4E8": (4, 4),
}
"""How many experts are routed, and how many of them a token runs."""

TOKENS = [(3, 5), (1, 1), (2, 200)]
"""Sequences and their length."""


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Part:
    """`experts` of random weights, behind `top_k_gating` of scores or on gates as they are given.

    Args:
        act, optional: The activation, and which of the optional operands there are.
        routed: Operands of `top_k_gating` behind the scores; None for no `top_k_gating`.
        moe: Ask for com.microsoft::MoE, which gives as many features as it takes.
    """

    def __init__(
        self, folder, count, active, act, optional, routed=None, neurons=NEURONS, *,
        moe=False, out=None,
    ):  # fmt: skip
        total, self.moe = count * neurons, moe
        out = out or (WIDTH if moe else OUT)
        shapes = {2: (total, WIDTH), 3: (out, total), 4: (total, WIDTH), 5: (total,), 6: (total,)}
        self.attrs = {"act": act, "active": active}
        self.weights = {i: random(*shapes[i], seed=i) for i in (2, 3, *optional)}
        self.program = Program("part", inputs={"input_ids": IDS}, outputs=["logits"])
        function = Function("part")
        self.program.functions["part"] = function
        for name, size in (("x", WIDTH), ("gates", count)):
            self.program.inputs[name] = Type((B, S, size), torch.float32)
            function.params.append(Value(name))
        x, gates = function.params

        def weight(slot, value):
            function.weights[slot] = Value(slot)
            self.program.weights.add(Weight(slot, Array(value)))
            return function.weights[slot]

        if routed is not None:
            given = [None if value is None else weight(f"r{i}", value)
                     for i, value in enumerate(routed)]  # fmt: skip
            gates = function.add("top_k_gating", [gates, *given], {"top_k": active}).output
        rest = [weight(f"w{i}", self.weights[i]) if i in self.weights else None
                for i in range(2, 7)]  # fmt: skip
        function.results = [function.add("experts", [x, gates, *rest], self.attrs).output]
        slots = {slot: slot for slot in function.weights}
        self.program.calls.append(Call("part", ["x", "gates"], ["logits"], slots))
        self.emitted = OnnxEmitter(moe=moe).emit(self.program, folder, "cpu", silent)
        self.path = folder / "onnx" / "model.onnx"
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 4
        self.session = ort.InferenceSession(str(self.path), settings)

    def run(self, feeds):
        return self.session.run(None, feeds)[0]

    def check(self, x, scores, gates, gate_sizes=None, run=None):
        """Compare what the graph gives for scores, or gates, with the op in fp64.

        The allowance is what rounding can do at most: a sum of n products is off by n u times
        the sum of their magnitudes, and an activation is no steeper than 1.13, with 8 u of its
        own. Magnitudes are those of a part of absolute values; `gate_sizes` are those that a
        gate was added up from. A gate by com.microsoft::MoE, a logarithm below 4 that goes through
        a softmax and comes back by a product with a sum, has less than 24 roundings of its own.

        Args:
            run: Takes feeds and returns logits; the session by default.
        """
        feeds = {"input_ids": np.zeros(x.shape[:2], dtype=np.int64)}
        feeds |= {"x": x.numpy(), "gates": scores.numpy()}
        found = (run or self.run)({n: v for n, v in feeds.items() if n in self.inputs})
        wide = [x.double(), gates.double()]
        wide += [self.weights[i].double() if i in self.weights else None for i in range(2, 7)]
        (expected,) = get_op("experts").reference(wide, self.attrs)
        sizes = [None if value is None else value.abs() for value in wide]
        sizes[1] = sizes[1] if gate_sizes is None else gate_sizes
        (magnitude,) = get_op("experts").reference(sizes, self.attrs | {"act": "relu"})
        roundings = 2 * 1.13 * (WIDTH + 1 + 8) + NEURONS + gates.shape[-1] + 8 + 24 * self.moe
        error = (torch.from_numpy(found).double() - expected).abs()
        assert bool((error <= roundings * 2**-24 * magnitude).all())
        return expected

    @property
    def inputs(self):
        return {item.name for item in self.session.get_inputs()}
