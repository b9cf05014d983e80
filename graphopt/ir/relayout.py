"""Giving the states of a program another layout."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.errors import UsageError
from graphopt.ir.graph import Call, Function, Node, Param, Program, unique_name
from graphopt.ir.kv import KVLayout
from graphopt.ir.verify import verify


def with_layouts(program: Program, layouts: Mapping[str, KVLayout]) -> Program:
    """Return a copy of a program whose states have the given layouts.

    The attention that extends a ring keeps as many keys; where the calls of a function differ in
    that, it is an attribute of the call.

    Args:
        layouts: By the names of states; the others keep theirs.

    Raises:
        UsageError: There is no such state.
        VerifyError: An attention cannot read such a layout, as a window longer than the ring.
    """
    result = program.copy()
    for name, layout in layouts.items():
        if name not in result.states:
            raise UsageError(
                f"There is no state {name!r}.", "Run insert-kv-cache, or name one of its states."
            )
        result.states[name].layout = layout
    for function in result.functions.values():
        calls = [call for call in result.calls if call.function == function.name]
        for cache in function.caches if calls else []:
            assert cache.present_k.node is not None
            rings = [result.states[call.caches[cache.slot]].layout.ring for call in calls]
            _set_rings(function, cache.present_k.node, calls, rings)
    verify(result)
    return result


def _set_rings(function: Function, node: Node, calls: list[Call], rings: list[int | None]) -> None:
    """Make an attention keep, call by call, as many keys as `rings` says."""
    if len(set(rings)) == 1:
        node.attrs.pop("ring", None)
        if rings[0] is not None:
            node.attrs["ring"] = rings[0]
        return
    attr = node.attrs.get("ring")
    if not isinstance(attr, Param):
        used = {p.name for n in function.nodes for p in n.attrs.values() if isinstance(p, Param)}
        attr = node.attrs["ring"] = Param(unique_name("ring", used))
    for call, ring in zip(calls, rings, strict=True):
        call.attrs[attr.name] = ring
