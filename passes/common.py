"""What several passes ask of a program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sympy

from graphopt.ir.graph import Call, Function, Node, Param, Program, Value
from graphopt.ir.ops import get_op
from graphopt.ir.ops.aten import map_leaves
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type

NO_VALUE = object()
"""What `uniform` returns where the calls differ."""


def calls_of(program: Program) -> dict[str, list[Call]]:
    """Return the calls of every function, by the function's name."""
    calls: dict[str, list[Call]] = {name: [] for name in program.functions}
    for call in program.calls:
        calls[call.function].append(call)
    return calls


def types_of(program: Program) -> dict[str, list[dict[Value, Type]]]:
    """Return, for every function, the types of its values in each distinct kind of call."""
    per_call, _ = infer_program(program)
    types: dict[str, list[dict[Value, Type]]] = {name: [] for name in program.functions}
    for call, values in zip(program.calls, per_call, strict=True):
        known = types[call.function]
        if not any(values is other for other in known):
            known.append(values)
    return types


def uniform(node: Node, key: str, calls: Iterable[Call]) -> Any:
    """Return attribute `key` of `node` if it is the same in all calls, else `NO_VALUE`.

    An attribute the node does not carry has its op's default.
    """
    value = node.attrs.get(key, get_op(node.op).defaults.get(key))
    if not isinstance(value, Param):
        return value
    values = [call.attrs[value.name] for call in calls]
    same = values and all(other == values[0] for other in values)
    return values[0] if same else NO_VALUE


def attribute_key(node: Node) -> Any:
    """Return a hashable form of the attributes, with defaults filled in."""
    attrs = {**get_op(node.op).defaults, **node.attrs}
    return tuple((key, repr(attrs[key])) for key in sorted(attrs))


def mentions_sizes(attrs: Mapping[str, Any]) -> bool:
    """True where an attribute depends on B, S or P."""
    found = False

    def look(leaf: Any) -> Any:
        nonlocal found
        found = found or (isinstance(leaf, sympy.Expr) and bool(leaf.free_symbols))
        return leaf

    for key, value in attrs.items():
        if key != "types":
            map_leaves(value, look)
    return found


def dead_nodes(function: Function) -> list[Node]:
    """Return the nodes whose outputs nothing alive reads."""
    alive = function.outside_values()
    dead: list[Node] = []
    for node in reversed(function.nodes):
        if any(value in alive for value in node.outputs):
            alive.update(value for value in node.inputs if value is not None)
        else:
            dead.append(node)
    return dead


def drop_newly_dead(function: Function, before: Iterable[Node]) -> None:
    """Delete what a rewrite left behind: dead nodes that were not in `before`, the dead of then.

    What was dead before stays, with what it reads: removing it is another pass's work.
    """
    old = set(map(id, before))
    alive = function.outside_values()
    kept: list[Node] = []
    for node in reversed(function.nodes):
        if id(node) in old or any(value in alive for value in node.outputs):
            alive.update(value for value in node.inputs if value is not None)
            kept.append(node)
    function.nodes = kept[::-1]
