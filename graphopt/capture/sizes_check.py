"""Whether a captured program computes at other sizes than those it was traced at."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.errors import CaptureError
from graphopt.execute.function_run import run_function
from graphopt.ir.graph import Call, Program, Value
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import B, P, S, Type
from graphopt.ir.weights import Weight

SIZES: tuple[Mapping[sympy.Symbol, int], ...] = (
    {B: 1, S: 1, P: 0},
    {B: 2, S: 37, P: 0},
)
"""Below and above what was traced."""


def check_sizes(program: Program) -> None:
    """Run every function once a choice of sizes, on tensors without memory.

    Raises:
        CaptureError: A node fails, or makes a tensor of another shape than the graph says.
    """
    types, carried = infer_program(program)
    seen: set[str] = set()
    for call, kinds in zip(program.calls, types, strict=True):
        if call.function not in seen:
            seen.add(call.function)
            args = [carried[name] for name in call.args]
            for sizes in SIZES:
                _check(program, call, args, kinds, sizes)


def _check(
    program: Program,
    call: Call,
    args: list[Type],
    kinds: Mapping[Value, Type],
    sizes: Mapping[sympy.Symbol, int],
) -> None:
    function = program.functions[call.function]
    made: list[tuple[Value, tuple[int, ...]]] = []
    with FakeTensorMode(), torch.no_grad():
        weights = {
            slot: torch.empty(program.weights[name].shape, dtype=_computed(program.weights[name]))
            for slot, name in call.weights.items()
        }
        inputs = [torch.zeros(kind.concrete(sizes), dtype=_computed(kind)) for kind in args]
        try:
            run_function(
                function, call, inputs, weights, sizes,
                observe=lambda value, tensor: made.append((value, tuple(tensor.shape))),
            )  # fmt: skip
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            node = function.nodes[len({value.node for value, _ in made})]
            raise _failed(call, node.outputs[0], node.op, str(error), sizes) from error
    for value, shape in made:
        wanted = kinds[value].concrete(sizes)
        if shape != wanted and value.node is not None:
            reason = f"it makes {list(shape)} where the graph says {list(wanted)}"
            raise _failed(call, value, value.node.op, reason, sizes)


def _computed(kind: Type | Weight) -> torch.dtype:
    """Return the dtype in which a value is computed with: fp32, in which models are captured.

    A checkpoint may hold weights of several.
    """
    return torch.float32 if kind.dtype.is_floating_point else kind.dtype


def _failed(
    call: Call, value: Value, op: str, reason: str, sizes: Mapping[sympy.Symbol, int]
) -> CaptureError:
    first = reason.strip().splitlines()[0].rstrip(".") if reason.strip() else "it fails"
    where = call.path or call.function
    return CaptureError(
        f"{where}: {value.name} = {op} does not compute for batch {sizes[B]} and length "
        f"{sizes[S]}: {first}.",
        "The module computes with the length as a plain number, as recurrent mixers do; such a "
        "mixer has no form in graphopt yet.",
    )
