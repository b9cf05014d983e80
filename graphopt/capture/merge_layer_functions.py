"""One function for layers that differ in attribute values alone."""

from __future__ import annotations

from typing import Any

from graphopt.capture.hoist import LayerKind, made_alike
from graphopt.ir.compare import slots_by_use, structure
from graphopt.ir.graph import Node, Param
from graphopt.ir.ops import is_aten


def merge_layer_functions(kinds: list[LayerKind]) -> list[LayerKind]:
    """Merge kinds whose functions are equal up to the attributes of raised ops.

    An attribute that differs becomes a `Param`, and each layer call's `attrs` gets its value.
    """
    merged: list[LayerKind] = []
    for kind in kinds:
        kind.attrs = kind.attrs or [{} for _ in kind.layer_calls]
        for other in merged:
            if _merge(other, kind):
                break
        else:
            merged.append(kind)
    return merged


def _attributes(node: Node) -> Any:
    """Return, of a raised op, only the names of its attributes: calls may differ in values."""
    return repr(node.attrs) if is_aten(node.op) else sorted(node.attrs)


def _merge(target: LayerKind, kind: LayerKind) -> bool:
    ours, theirs = target.raiser.function, kind.raiser.function
    if structure(ours, _attributes) != structure(theirs, _attributes):
        return False
    if slots_by_use(ours) != slots_by_use(theirs):
        return False
    if sorted(target.slots.derived) != sorted(kind.slots.derived):
        return False
    constants = kind.raiser.constants
    if constants.keys() != target.raiser.constants.keys():
        return False
    if not made_alike(kind.records[0].module, constants, target.raiser.constants):
        return False
    taken = {p.name for n in ours.nodes for p in n.attrs.values() if isinstance(p, Param)}
    for node, other in zip(ours.nodes, theirs.nodes, strict=True):
        if is_aten(node.op):
            continue
        for key in node.attrs:
            a, b = node.attrs[key], other.attrs[key]
            if isinstance(a, Param) and isinstance(b, Param):
                for attrs in kind.attrs:
                    attrs[a.name] = attrs.pop(b.name)
                continue
            if type(a) is type(b) and a == b:
                continue
            if not isinstance(a, Param):
                name = key
                while name in taken:
                    name += "_"
                taken.add(name)
                for attrs in target.attrs:
                    attrs[name] = a
                a = node.attrs[key] = Param(name)
            for attrs in kind.attrs:
                attrs[a.name] = attrs.pop(b.name) if isinstance(b, Param) else b
    # Slots and parameters of the same position keep the target's names.
    target.layer_calls += kind.layer_calls
    target.records += kind.records
    target.attrs += kind.attrs
    return True
