"""What two programs differ in: structure, attributes, wiring, sizes of weights."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from graphopt.ir.graph import Call, Function, In, Node, Program, Value, resolve_attrs
from graphopt.ir.printer import FunctionPrinter
from graphopt.ir.text import policy_text
from graphopt.support.tensor_bytes import tensor_bytes


def slots_by_use(function: Function) -> list[str]:
    """Return the weight slots in the order in which nodes first read them."""
    slot_of = function.slots_by_value()
    read = [slot_of[v] for node in function.nodes for v in node.inputs if v in slot_of]
    read += [slot_of[v] for v in function.results if v in slot_of]
    return list(dict.fromkeys(read))


def structure(function: Function, attributes: Callable[[Node], Any]) -> list[Any]:
    """Return what two functions must share to be one, whatever their values are called.

    Args:
        attributes: What counts of a node's attributes.

    Returns:
        The numbers of parameters, weight slots and caches, a row a node, and the results.
    """
    number: dict[Value, int] = {}
    slots = slots_by_use(function)
    for value in [*function.params, *(function.weights[slot] for slot in slots)]:
        number[value] = len(number)
    for cache in function.caches:
        for value in cache.pasts:
            number[value] = len(number)
    rows: list[Any] = [(len(function.params), len(slots), len(function.caches))]
    for node in function.nodes:
        operands = [None if v is None else number[v] for v in node.inputs]
        rows.append((node.op, operands, attributes(node), len(node.outputs)))
        for value in node.outputs:
            number[value] = len(number)
    rows.append([number[value] for value in function.results])
    return rows


_EITHER_WAY = {
    "add", "mul", "aten.add.Tensor", "aten.mul.Tensor", "aten.maximum.default",
    "aten.minimum.default", "aten.eq.Tensor", "aten.ne.Tensor", "aten.bitwise_and.Tensor",
    "aten.bitwise_or.Tensor", "aten.logical_and.default", "aten.logical_or.default",
}  # fmt: skip
"""Ops whose two operands may change places."""


def in_order_of_use(program: Program) -> Program:
    """Return a copy whose functions say the same in one order, however they were written.

    Nodes stand where what comes behind first needs them, and parameters in the order in which
    nodes read them; of the two operands of a sum or a product the same one is first, and so it is
    of results, unless they are made alike; and operands that are left out at the end are not
    mentioned.
    """
    program = program.copy()
    for function in program.functions.values():
        for node in function.nodes:
            while node.inputs and node.inputs[-1] is None:
                node.inputs.pop()
        calls = [call for call in program.calls if call.function == function.name]
        keys = _keys_by_use(function, _constants(program, function, calls), calls)
        for node in function.nodes:
            operands = [_NO_KEY if value is None else keys.get(value, _OTHER_KEY)
                        for value in node.inputs]  # fmt: skip
            if _symmetric(node) and operands[0] > operands[1]:
                node.inputs.reverse()
                operands.reverse()
            for index, value in enumerate(node.outputs):
                keys[value] = _key(
                    [
                        (index, described, [operand[level] for operand in operands])
                        for level, described in enumerate(_described(node, calls))
                    ]
                )
        order = sorted(
            range(len(function.results)),
            key=lambda i: keys.get(function.results[i], _OTHER_KEY),
        )
        function.results = [function.results[i] for i in order]
        for call in calls:
            call.results = [call.results[i] for i in order]
        _sort_nodes(function)
        _sort_params(function, calls)
    return program


def _symmetric(node: Node) -> bool:
    if node.op not in _EITHER_WAY or len(node.inputs) != 2:
        return False
    # An ATen node may name one operand twice, or scale the second.
    return node.attrs.get("args", [In(0), In(1)]) == [In(0), In(1)] and not node.attrs.get("kwargs")


def _constants(program: Program, function: Function, calls: list[Call]) -> dict[Value, int]:
    """Return a number for the content of every constant that a function's first call reads."""
    found: dict[Value, int] = {}
    for slot, value in function.weights.items() if calls else ():
        weight = program.weights[calls[0].weights[slot]]
        if weight.constant:
            found[value] = zlib.crc32(tensor_bytes(weight.load()).numpy().tobytes())
    return found


_Key: TypeAlias = tuple[int, ...]
"""Numbers for how a value is made: without numbers and constants, which decide last, and with."""

_NO_KEY: _Key = (-2, -2)
_OTHER_KEY: _Key = (-3, -3)


def _key(levels: Sequence[Any]) -> _Key:
    return tuple(zlib.crc32(repr(level).encode()) for level in levels)


def _described(node: Node, calls: list[Call]) -> tuple[Any, Any]:
    """Return a node's op and attributes, without the values of numbers and with them.

    A number is an attribute of the call where layers that differ in it share a function, and of
    the node where it is the same in all.
    """
    attrs = resolve_attrs(node, calls[0]) if calls else node.attrs
    kept = {
        name: None if isinstance(value, int | float | None) else value
        for name, value in attrs.items()
    }
    return (node.op, sorted(kept.items())), (node.op, sorted(attrs.items()))


def _keys_by_use(
    function: Function, constants: Mapping[Value, int], calls: list[Call]
) -> dict[Value, _Key]:
    """Return a key for every parameter and weight that its place in a list has no part in."""
    read: dict[Value, list[Any]] = {value: [] for value in function.params}
    read |= {value: [] for value in function.weights.values()}
    for node in function.nodes:
        for index, value in enumerate(node.inputs):
            if value in read:
                place = -1 if _symmetric(node) else index
                read[value].append([repr((place, level)) for level in _described(node, calls)])
    params = set(function.params)
    return {
        value: _key(
            [
                (value in params, known, sorted(place[level] for place in places))
                for level, known in enumerate((value in constants, constants.get(value)))
            ]
        )
        for value, places in read.items()
    }


def _sort_nodes(function: Function) -> None:
    """Put every node where what comes behind first needs it."""
    order: dict[Node, None] = {}
    ends = [
        *function.results,
        *(v for c in function.caches for v in c.presents),
    ]
    waiting: list[tuple[Node, bool]] = [(v.node, False) for v in ends[::-1] if v.node]
    while waiting:
        node, complete = waiting.pop()
        if complete:
            order[node] = None
        elif node not in order:
            needed = [value.node for value in node.inputs if value is not None and value.node]
            waiting += [(node, True), *((other, False) for other in needed[::-1])]
    function.nodes = list(order)


def _sort_params(function: Function, calls: list[Call]) -> None:
    """Put parameters in the order in which nodes first read them."""
    read = [value for node in function.nodes for value in node.inputs] + function.results
    places = {value: place for place, value in reversed(list(enumerate(read)))}
    order = sorted(
        range(len(function.params)), key=lambda i: places.get(function.params[i], len(read))
    )
    function.params = [function.params[i] for i in order]
    for call in calls:
        call.args = [call.args[i] for i in order]


def first_difference(have: Program, want: Program, *, encodings: bool = True) -> str | None:
    """Return the first thing in which `have` is not `want`, or None where they are equal.

    Names of values and functions don't count, nor do values of weights.

    Args:
        encodings: Whether it counts how weights are stored.
    """
    if len(have.calls) != len(want.calls):
        return f"it has {len(have.calls)} calls, not {len(want.calls)}"
    # Values are numbered as they are made; inputs, by name, have the numbers below zero.
    wires = [{n: -1 - i for i, n in enumerate(sorted(p.inputs))} for p in (have, want)]
    made = 0
    for ours, theirs in zip(have.calls, want.calls, strict=True):
        where = ours.path or ours.function
        found = _call_difference(have, ours, want, theirs, encodings)
        if found is not None:
            return f"{where}: {found}"
        if [wires[0].get(a) for a in ours.args] != [wires[1].get(a) for a in theirs.args]:
            return f"{where}: it reads {', '.join(ours.args)}"
        for a, b in zip(ours.results, theirs.results, strict=True):
            wires[0][a] = wires[1][b] = made
            made += 1
    return None


def _call_difference(
    have: Program, ours: Call, want: Program, theirs: Call, encodings: bool
) -> str | None:
    if ours.placement != theirs.placement:
        return f"it is {ours.placement or 'unplaced'}, not {theirs.placement or 'unplaced'}"
    a, b = have.functions[ours.function], want.functions[theirs.function]
    rows, others = (
        structure(f, lambda node, c=call: repr(sorted(resolve_attrs(node, c).items())))  # type: ignore[misc]
        for f, call in ((a, ours), (b, theirs))
    )
    for index, (row, other) in enumerate(zip(rows, others, strict=False)):
        if row != other:
            mine, other_index = _only_here(rows, others) or (index, index)
            return f"{_describe(a, ours, mine)}, not {_describe(b, theirs, other_index)}"
    if len(rows) != len(others):
        return f"it has {len(a.nodes)} nodes, not {len(b.nodes)}"
    for slot, other_slot in zip(slots_by_use(a), slots_by_use(b), strict=True):
        x, y = have.weights[ours.weights[slot]], want.weights[theirs.weights[other_slot]]
        if x.shape != y.shape:
            return f"weight {slot!r} is {list(x.shape)}, not {list(y.shape)}"
        if encodings and x.encoding != y.encoding:
            ours_as, theirs_as = (w.encoding or "dense" for w in (x, y))
            return f"weight {slot!r} is {ours_as}, not {theirs_as}"
        if x.placement != y.placement:
            return (
                f"weight {slot!r} is {x.placement or 'unplaced'}, not {y.placement or 'unplaced'}"
            )
        if x.constant != y.constant:
            return f"weight {slot!r} is {'a constant' if x.constant else 'no constant'}"
    for cache, wanted_cache in zip(a.caches, b.caches, strict=True):
        state = have.states[ours.caches[cache.slot]]
        wanted = want.states[theirs.caches[wanted_cache.slot]]
        if state.placement != wanted.placement:
            have_as, want_as = (s.placement or "unplaced" for s in (state, wanted))
            return f"state {state.name!r} is {have_as}, not {want_as}"
        if state.host != wanted.host:
            shares = [str(s.host or "whole") for s in (state, wanted)]
            return f"state {state.name!r} is {shares[0]}, not {shares[1]}"
        if (state.types, state.layout) != (wanted.types, wanted.layout):
            have_as, want_as = (f"{s.types[0]}, {s.types[1]} {s.layout}" for s in (state, wanted))
            return f"state {state.name!r} is {have_as}, not {want_as}"
        if state.policy != wanted.policy:
            have_as, want_as = (
                "no policy" if s.policy is None else policy_text(s.policy) for s in (state, wanted)
            )
            return f"state {state.name!r} has {have_as}, not {want_as}"
    return None


def _only_here(rows: list[Any], others: list[Any]) -> tuple[int, int] | None:
    """Return the first row of each whose op and attributes the other has fewer of.

    A node of another kind moves those around it in the order of use; it is the one to name.
    """

    def kinds(of: list[Any]) -> list[Any]:
        return [(row[0], row[2]) for row in of[1:-1]]

    def first(ours: list[Any], theirs: list[Any]) -> int | None:
        more = Counter(ours) - Counter(theirs)
        return next((i for i, kind in enumerate(ours, start=1) if kind in more), None)

    mine, other = first(kinds(rows), kinds(others)), first(kinds(others), kinds(rows))
    return None if mine is None or other is None else (mine, other)


def _describe(function: Function, call: Call, index: int) -> str:
    """Return row `index` of `structure` as it is printed, attributes with the call's values."""
    if not 1 <= index <= len(function.nodes):
        return f"({', '.join(v.name for v in function.results)})"
    node = function.nodes[index - 1]
    shown = Node(node.op, node.inputs, resolve_attrs(node, call), node.outputs)
    return FunctionPrinter(function).expression(shown)
