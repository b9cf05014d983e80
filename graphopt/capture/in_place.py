"""In-place operators of an exported graph: what their results are as new values.

The conversion to a function gives later readers of a written tensor its new value, and later
readers of the tensor of which a slice is written the value with that slice replaced. Where memory
is seen in other ways, torch makes the graph functional first, which takes longer than the export.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

SCATTERS = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}
"""Operator that takes a part of a tensor -> operator that replaces this part."""


def is_in_place(node: Node) -> bool:
    """Return whether a node's operator writes into one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def written_slice(node: Node) -> Node | None:
    """Return the slice into which an in-place operator writes; None where it writes no slice.

    Only a slice of a value that the graph computes, and that is none itself.
    """
    view = node.args[0] if node.args else None
    if not isinstance(view, Node) or view.target not in SCATTERS:
        return None
    base = view.args[0]
    assert isinstance(base, Node)
    return view if base.op == "call_function" and _memory_of(base) is None else None


def needs_functionalizing(graph: Graph) -> bool:
    """Return whether a value that an in-place operator changes is read by another name later."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    owner: dict[Node, Node] = {}
    names: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        memory = _memory_of(node)
        owner[node] = node if memory is None else owner[memory]
        names.setdefault(owner[node], []).append(node)
    for node in graph.nodes:
        if not is_in_place(node):
            continue
        schema = getattr(node.target, "_schema")  # noqa: B009  (targets are typed as callables)
        written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        target = node.args[0] if node.args else None
        if written.index(True) or sum(written) > 1 or not isinstance(target, Node):
            return True
        if owner[target].op != "call_function":
            return True
        updated = {target}
        if (view := written_slice(node)) is not None:
            updated.add(owner[view])
        for name in names[owner[target]]:
            if name in updated or place[name] >= place[node]:
                continue
            if any(place[user] > place[node] for user in name.users):
                return True
    return False


def _memory_of(node: Node) -> Node | None:
    """Return the operand in whose memory a result may lie; None where it has its own."""
    operand = node.args[0] if node.args else None
    if not isinstance(operand, Node):
        return None
    if node.target is operator.getitem:  # of a list: of views, as a split's, or of results
        return operand if _memory_of(operand) is not None else None
    schema = getattr(node.target, "_schema", None)
    if schema is None or all(result.alias_info is None for result in schema.returns):
        return None
    return operand
