"""Functions of a program as compiled torch functions: many small kernels become few.

Compiling takes seconds, so it pays for what is run hundreds of times, such as a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.execute.function_run import run_function
from graphopt.ir.graph import Call, Function, Value
from graphopt.ir.weights import Weight

_made: dict[Any, Callable[..., list[Tensor]]] = {}
"""What was compiled, by all that it depends on: models of one family share it."""


def kind(function: Function, call: Call, given: Iterable[Tensor | Weight]) -> Any:
    """Return a key that calls share which one compilation serves, for inputs of one size."""
    shapes = tuple((tuple(value.shape), value.dtype) for value in given)
    return _structure(function), repr(sorted(call.attrs.items())), shapes


def _structure(function: Function) -> Any:
    """Return all that a function computes, as a key; names of values are no part of it."""
    numbers: dict[Value | None, int] = {v: n for n, v in enumerate(function.values())}
    numbers[None] = -1
    nodes = tuple(
        (
            node.op,
            tuple(numbers[value] for value in node.inputs),
            repr(sorted(node.attrs.items())),
            tuple(numbers[value] for value in node.outputs),
        )
        for node in function.nodes
    )
    caches = tuple(
        (c.slot, *(numbers[v] for v in (*c.pasts, *c.presents))) for c in function.caches
    )
    results = tuple(numbers[value] for value in function.results)
    return len(function.params), tuple(function.weights), caches, nodes, results


def run_compiled(
    function: Function,
    call: Call,
    args: Sequence[Tensor | None],
    weights: Mapping[str, Tensor],
    sizes: Mapping[sympy.Symbol, int],
) -> list[Tensor]:
    """Return the results of one call without a cache, as `run_function` does.

    Calls that differ in their weights alone share one compilation, as long as the same operands
    take gradients and autocast is the same.

    Raises:
        Exception: Whatever torch.compile raises where it cannot work, such as a C compiler that
            is not installed; also when a gradient is taken for the first time.
    """
    given = [value for value in (*args, *weights.values()) if value is not None]
    sized = tuple(sorted((str(name), size) for name, size in sizes.items()))
    key = (kind(function, call, given), sized, tuple(value.device for value in given))
    if key not in _made:
        _made[key] = _compile(function, call, args, weights, sizes, given)
    return _made[key](*given)


def _compile(
    function: Function,
    call: Call,
    args: Sequence[Tensor | None],
    weights: Mapping[str, Tensor],
    sizes: Mapping[sympy.Symbol, int],
    given: Sequence[Tensor],
) -> Callable[..., list[Tensor]]:
    slots, missing = list(weights), [value is None for value in args]

    def plain(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        operands: list[Any] = [None if none else next(rest) for none in missing]
        return run_function(function, call, operands, dict(zip(slots, rest, strict=True)), sizes)[0]

    # Traced here and not by the compiler, which would have to follow the interpreter.
    graph = make_fx(plain, pre_dispatch=True)(*(value.detach() for value in given))
    compiled: Callable[..., list[Tensor]] = torch.compile(graph, dynamic=False)
    return compiled
