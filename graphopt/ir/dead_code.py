"""Dead-code elimination in a function: what nothing reads."""

from __future__ import annotations

from collections.abc import Iterable

from graphopt.ir.graph import Function, Node


def _split(function: Function, keep: Iterable[Node] = ()) -> tuple[list[Node], list[Node]]:
    """Return the nodes that something reads, or that are to be kept, and the others; in order."""
    kept_anyway = set(map(id, keep))
    alive = function.outside_values()
    read: list[Node] = []
    dead: list[Node] = []
    for node in reversed(function.nodes):
        if id(node) in kept_anyway or any(value in alive for value in node.outputs):
            alive.update(value for value in node.inputs if value is not None)
            read.append(node)
        else:
            dead.append(node)
    return read[::-1], dead[::-1]


def dead_nodes(function: Function) -> list[Node]:
    """Return the nodes whose outputs neither the results nor a node that is read need."""
    return _split(function)[1]


def remove_dead(function: Function) -> int:
    """Delete nodes and weight slots that nothing reads; return how many nodes went."""
    function.nodes, dead = _split(function)
    read = function.outside_values()
    read.update(value for node in function.nodes for value in node.inputs if value is not None)
    function.weights = {slot: value for slot, value in function.weights.items() if value in read}
    return len(dead)


def remove_newly_dead(function: Function, before: Iterable[Node]) -> int:
    """Delete what a rewrite made unread; return how many nodes went.

    Args:
        before: The dead nodes of before the rewrite. They stay, with what they read.
    """
    function.nodes, dead = _split(function, before)
    return len(dead)
