"""Running one function of a program on tensors, node by node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal

import sympy
from torch import Tensor

from graphopt.execute import fused_norm, fused_rope
from graphopt.ir.graph import Call, Function, Node, Value, resolve_attrs
from graphopt.ir.kv_memory import PagedKV, PolicyKV
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.aten import concretize

Mode = Literal["torch", "fused", "reference"]
"""Which implementation of the ops: `fused` is `torch`, but that norms and rotary positions are a
kernel each on a GPU, which round less often."""
CacheContents = dict[str, tuple[Tensor, Tensor] | PagedKV | PolicyKV]
"""State name -> (keys [B, G, P, D], values [B, G, P, Dv]), of a ring its last tokens.

Where a policy selects among them, with the policy's state.
"""
Observer = Callable[[Value, Tensor], None]
"""Is called with a value of a function and its tensor, when the tensor is made."""
_PRODUCTS = ("linear", "experts")
"""Ops that multiply their first operand by weights, and do nothing else with it."""


def run_function(
    function: Function,
    call: Call,
    args: Sequence[Tensor | None],
    weights: Mapping[str, Tensor],
    sizes: Mapping[sympy.Symbol, int],
    past: CacheContents | None = None,
    mode: Mode = "torch",
    observe: Observer | None = None,
) -> tuple[list[Tensor], CacheContents]:
    """Run one call.

    Args:
        args: Arguments in the order of the function's parameters; None for an absent one.
        weights: Value of every weight slot.
        sizes: B, S and P.
        past: KV cache contents of the call's states.
        observe: Called with every node output as it is made.

    Returns:
        The results in the function's order, and the new cache contents.
    """
    values = _given_values(function, call, args, weights, past)
    _run_nodes(
        function.nodes, call, values, function.outside_values(), sizes, mode, observe or _ignore
    )
    present: CacheContents = {}
    for cache in function.caches:
        assert past is not None
        kv, name = (values[cache.present_k], values[cache.present_v]), call.caches[cache.slot]
        state = tuple(values[value] for value in cache.present_state)
        present[name] = PolicyKV(kv, state) if isinstance(past[name], PolicyKV) else kv
    return [values[value] for value in function.results], present


def function_values(
    function: Function,
    call: Call,
    args: Sequence[Tensor | None],
    weights: Mapping[str, Tensor],
    sizes: Mapping[sympy.Symbol, int],
    wanted: Sequence[Value],
    *,
    known: Mapping[Value, Tensor] | None = None,
    past: CacheContents | None = None,
    mode: Mode = "torch",
) -> list[Tensor]:
    """Return values inside one call; only what they depend on is run.

    Args:
        args, weights, sizes, past: As for `run_function`.
        wanted: Values of the function.
        known: Values of the function that are given: what they are made of is not run.
    """
    values = {**_given_values(function, call, args, weights, past), **(known or {})}
    missing = {value for value in wanted if value not in values}
    nodes: list[Node] = []
    for node in reversed(function.nodes):
        if not missing.isdisjoint(node.outputs):
            nodes.append(node)
            missing.difference_update(node.outputs)
            missing |= {v for v in node.inputs if v is not None and v not in values}
    _run_nodes(nodes[::-1], call, values, set(wanted), sizes, mode, _ignore)
    return [values[value] for value in wanted]


def _given_values(
    function: Function,
    call: Call,
    args: Sequence[Tensor | None],
    weights: Mapping[str, Tensor],
    past: CacheContents | None,
) -> dict[Value, Any]:
    """Return the tensors of a function's parameters, weights and cache inputs."""
    values: dict[Value, Any] = dict(zip(function.params, args, strict=True))
    values.update({value: weights[slot] for slot, value in function.weights.items()})
    for cache in function.caches:
        assert past is not None
        held = past[call.caches[cache.slot]]
        values[cache.past_k], values[cache.past_v] = held
        state = held.state if isinstance(held, PolicyKV) else ()
        values.update(zip(cache.past_state, state, strict=True))
    return values


def _run_nodes(
    nodes: Sequence[Node],
    call: Call,
    values: dict[Value, Any],
    outside: Set[Value],
    sizes: Mapping[sympy.Symbol, int],
    mode: Mode,
    observe: Observer,
) -> None:
    """Run nodes in order on `values`, to which their outputs are added.

    A value is dropped behind its last reader, unless it is in `outside`.
    """
    last_use: dict[Value, int] = {}
    for index, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None:
                last_use[value] = index
    # Where an operator makes a tensor of none, such as arange.
    device = next((x.device for x in values.values() if isinstance(x, Tensor)), None)
    products: Set[Value] = frozenset()
    if mode == "fused" and observe is _ignore:
        products = _read_by_products(nodes) - outside
    for index, node in enumerate(nodes):
        op, attrs = get_op(node.op), resolve_attrs(node, call)
        if is_aten(node.op):
            attrs = {**concretize(attrs, sizes), "target": node.op, "device": device}
        operands = [None if v is None else values[v] for v in node.inputs]
        outputs: Sequence[Tensor]
        if mode == "fused" and node.op == "rms_norm":
            for_products = node.output in products
            outputs = fused_norm.rms_norm(operands, attrs, for_products=for_products)
        elif mode == "fused" and node.op == "rope":
            outputs = fused_rope.rope(operands, attrs)
        else:
            outputs = (op.reference if mode == "reference" else op.torch)(operands, attrs)
        for value, tensor in zip(node.outputs, outputs, strict=False):
            values[value] = tensor
            observe(value, tensor)
        del operands, outputs
        for value in node.inputs:
            if value is not None and last_use[value] == index and value not in outside:
                values.pop(value, None)


def _read_by_products(nodes: Sequence[Node]) -> set[Value]:
    """Return the values that are what products multiply by weights, and nothing else."""
    read, otherwise = set(), set()
    for node in nodes:
        operands = [value for value in node.inputs if value is not None]
        first = node.op in _PRODUCTS
        read.update(operands[:first])
        otherwise.update(operands[first:])
    return read - otherwise


def _ignore(value: Value, tensor: Tensor) -> None:
    """Observe nothing."""
