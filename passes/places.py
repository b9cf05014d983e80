"""Where a program counts the tokens of a step, which with a cache begins behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

from graphopt.ir.graph import Function, Node, Value
from graphopt.ir.types import P, S, Type, dim


def laid_out_from_start(function: Function, types: Mapping[Value, Type]) -> list[Node]:
    """Return the nodes that give the tokens of a step their places, counted from 0.

    Those are the numbers from 0 to S, and the first S rows of a table.
    """
    found: list[Node] = []
    for node in function.nodes:
        sizes = [size for v in node.inputs if v is not None for size in types[v].shape]
        by_length = any(isinstance(x, sympy.Expr) and S in x.free_symbols for x in sizes)
        if _bounds(node) == (0, S) and not by_length:
            found.append(node)
    return found


def start_at_past(node: Node) -> None:
    """Let a node of `laid_out_from_start` count from P."""
    args = node.attrs["args"]
    if node.op.startswith("aten.arange."):
        node.op, node.attrs["args"] = "aten.arange.start", [P, dim(P + S)]
    elif node.op.startswith("aten.narrow."):
        node.attrs["args"] = [*args[:2], P, S]
    else:
        node.attrs["args"] = [*args[:2], P, dim(P + S), *args[4:]]


def _bounds(node: Node) -> tuple[Any, Any] | None:
    """Return where an `arange`, `slice` or `narrow` of step 1 begins and ends."""
    args = list(node.attrs.get("args", ()))
    if node.op.startswith("aten.arange.") and args:
        start, end, step = (0, args[0], 1) if len(args) == 1 else (*args, 1)[:3]
    elif node.op.startswith("aten.slice.") and len(args) >= 4:
        start, end, step = (*args[2:], 1)[:3]
    elif node.op.startswith("aten.narrow.") and len(args) == 4:
        start, end, step = args[2], dim(args[2] + args[3]), 1
    else:
        return None
    return (start or 0, end) if step == 1 else None
