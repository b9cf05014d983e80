"""What two programs differ in: structure, attributes, wiring, sizes of weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from graphopt.ir.graph import Call, Function, Node, Program, Value, resolve_attrs
from graphopt.ir.printer import FunctionPrinter


def slots_by_use(function: Function) -> list[str]:
    """Return the weight slots in the order in which nodes first read them."""
    slot_of = {value: slot for slot, value in function.weights.items()}
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
        for value in (cache.past_k, cache.past_v):
            number[value] = len(number)
    rows: list[Any] = [(len(function.params), len(slots), len(function.caches))]
    for node in function.nodes:
        operands = [None if v is None else number[v] for v in node.inputs]
        rows.append((node.op, operands, attributes(node), len(node.outputs)))
        for value in node.outputs:
            number[value] = len(number)
    rows.append([number[value] for value in function.results])
    return rows


_EITHER_WAY = ("add", "mul")
"""Ops whose two operands may change places."""


def in_order_of_use(program: Program) -> Program:
    """Return a copy whose functions say the same in one order, however they were written.

    Nodes stand where what comes behind first needs them; of the two operands of a sum or a
    product the same one is first, unless they are made alike; and operands that are left out at
    the end are not mentioned.
    """
    program = program.copy()
    for function in program.functions.values():
        keys: dict[Value, int] = dict.fromkeys(function.weights.values(), -1)
        keys |= {value: index for index, value in enumerate(function.params)}
        for node in function.nodes:
            while node.inputs and node.inputs[-1] is None:
                node.inputs.pop()
            operands = [-2 if value is None else keys.get(value, -3) for value in node.inputs]
            if node.op in _EITHER_WAY and len(operands) == 2 and operands[0] > operands[1]:
                node.inputs.reverse()
                operands.reverse()
            known = repr((node.op, sorted(node.attrs.items()), operands))
            for index, value in enumerate(node.outputs):
                keys[value] = zlib.crc32(f"{index} {known}".encode())
        order: dict[Node, None] = {}
        ends = [
            *function.results,
            *(v for c in function.caches for v in (c.present_k, c.present_v)),
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
    return program


def first_difference(have: Program, want: Program) -> str | None:
    """Return the first thing in which `have` is not `want`, or None where they are equal.

    Names of values and functions don't count, nor do values of weights.
    """
    if len(have.calls) != len(want.calls):
        return f"it has {len(have.calls)} calls, not {len(want.calls)}"
    # Values are numbered as they are made; inputs, by name, have the numbers below zero.
    wires = [{n: -1 - i for i, n in enumerate(sorted(p.inputs))} for p in (have, want)]
    made = 0
    for ours, theirs in zip(have.calls, want.calls, strict=True):
        where = ours.path or ours.function
        found = _call_difference(have, ours, want, theirs)
        if found is not None:
            return f"{where}: {found}"
        if [wires[0].get(a) for a in ours.args] != [wires[1].get(a) for a in theirs.args]:
            return f"{where}: it reads {', '.join(ours.args)}"
        for a, b in zip(ours.results, theirs.results, strict=True):
            wires[0][a] = wires[1][b] = made
            made += 1
    return None


def _call_difference(have: Program, ours: Call, want: Program, theirs: Call) -> str | None:
    a, b = have.functions[ours.function], want.functions[theirs.function]
    rows, others = (
        structure(f, lambda node, c=call: repr(sorted(resolve_attrs(node, c).items())))  # type: ignore[misc]
        for f, call in ((a, ours), (b, theirs))
    )
    for index, (row, other) in enumerate(zip(rows, others, strict=False)):
        if row != other:
            return f"{_describe(a, ours, index)}, not {_describe(b, theirs, index)}"
    if len(rows) != len(others):
        return f"it has {len(a.nodes)} nodes, not {len(b.nodes)}"
    for slot, twin in zip(slots_by_use(a), slots_by_use(b), strict=True):
        x, y = have.weights[ours.weights[slot]], want.weights[theirs.weights[twin]]
        if x.shape != y.shape:
            return f"weight {slot!r} is {list(x.shape)}, not {list(y.shape)}"
        if x.constant != y.constant:
            return f"weight {slot!r} is {'a constant' if x.constant else 'no constant'}"
    return None


def _describe(function: Function, call: Call, index: int) -> str:
    """Return row `index` of `structure` as it is printed, attributes with the call's values."""
    if not 1 <= index <= len(function.nodes):
        return f"({', '.join(v.name for v in function.results)})"
    node = function.nodes[index - 1]
    shown = Node(node.op, node.inputs, resolve_attrs(node, call), node.outputs)
    return FunctionPrinter(function).expression(shown)
