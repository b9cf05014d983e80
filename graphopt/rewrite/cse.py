"""Common-subexpression elimination in a function."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any

from graphopt.ir.graph import Function, Node, Value
from graphopt.ir.ops import COMMUTATIVE, get_op
from graphopt.ir.ops.aten import is_random


def attribute_key(node: Node) -> Any:
    """Return a hashable form of the attributes, with defaults filled in."""
    attrs = {**get_op(node.op).defaults, **node.attrs}
    return tuple((key, repr(attrs[key])) for key in sorted(attrs))


def node_key(node: Node) -> Hashable:
    """Return what two nodes of a function have in common exactly if they compute the same."""
    operands = [0 if value is None else id(value) for value in node.inputs]
    if node.op in COMMUTATIVE:
        operands.sort()
    return (node.op, tuple(operands), attribute_key(node))


def equal_node(
    function: Function, op: str, inputs: Sequence[Value | None], attrs: dict[str, Any]
) -> Node | None:
    """Return the first node that computes an operation already; None if there is none."""
    wanted = node_key(Node(op, list(inputs), attrs))
    return next((node for node in function.nodes if node_key(node) == wanted), None)


def merge_equal_nodes(function: Function, leave: Collection[Node] = ()) -> int:
    """Make readers of a repeated node read the first one; return how many nodes went.

    Args:
        leave: Nodes that are equal to no other.
    """
    first: dict[Hashable, Node] = {}
    kept: list[Node] = []
    for node in function.nodes:
        if node in leave or is_random(node):
            kept.append(node)
            continue
        earlier = first.setdefault(node_key(node), node)
        if earlier is node:
            kept.append(node)
            continue
        for old, new in zip(node.outputs, earlier.outputs, strict=True):
            function.replace(old, new)
    merged = len(function.nodes) - len(kept)
    function.nodes = kept
    return merged
