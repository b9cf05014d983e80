"""Norms over all heads of a projection, in two halves: a mean that ranks add up, and the rest."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.ir.graph import Function, Node, Value
from graphopt.ir.types import Type

_HEADS = ("split_heads", "aten.reshape.default", "aten.view.default")


def with_halved_norms(
    function: Function, types: Mapping[Value, Type]
) -> tuple[Function, dict[Value, Value]] | None:
    """Return a copy in which RMS norms between a projection and its heads are two nodes each.

    Returns:
        The copy, and its values by those of the function; None where there is no such norm.
    """
    places = [place for place, node in enumerate(function.nodes) if _is_over_heads(function, node)]
    if not places:
        return None
    copied = function.clone()
    values = dict(zip(function.values(), copied.values(), strict=True))
    for old in [function.nodes[place] for place in places]:
        node = values[old.output].node
        assert node is not None and old.inputs[0] is not None
        x, *rest = node.inputs
        features = types[old.inputs[0]].shape[-1]
        name = f"{node.output.name}_mean"
        mean = copied.add("mean_square", [x], {"features": features}, [name], before=node)
        node.op, node.inputs = "rms_norm_by", [x, mean.output, *rest]
    return copied, values


def _is_over_heads(function: Function, node: Node) -> bool:
    x = node.inputs[0] if node.op == "rms_norm" else None
    if x is None or x.node is None or x.node.op != "linear":
        return False
    readers = [user for user, _ in function.uses()[node.output]]
    return bool(readers) and all(user.op in _HEADS for user in readers)
