"""One form for what can be written in several ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from graphopt.ir.graph import Call, Function, In, Node, Param, Program, Value
from graphopt.ir.types import Type
from graphopt.pass_manager.contract import Context, Pass, PassResult, register_pass
from graphopt.passes.common import (
    NO_VALUE,
    calls_of,
    dead_nodes,
    drop_newly_dead,
    types_of,
    uniform,
)


@dataclass
class Place:
    """A node a rule looks at, with what is known about its function."""

    node: Node
    function: Function
    calls: list[Call]
    types: list[dict[Value, Type]]
    order: dict[Value, int]

    def attr(self, key: str, node: Node | None = None) -> object:
        return uniform(node or self.node, key, self.calls)

    def maker(self, operand: int, op: str) -> Node | None:
        """Return the node that makes an operand if it is an `op`."""
        value = self.node.inputs[operand]
        if value is None or value.node is None or value.node.op != op:
            return None
        return value.node

    def same_type(self, a: Value, b: Value) -> bool:
        return all(types[a] == types[b] for types in self.types)


Outcome: TypeAlias = "Value | bool"
"""A value to use in place of the node's output, or whether the node was changed in place."""

_FORWARDING = frozenset(
    f"aten.{name}"
    for name in (
        "alias.default",
        "clone.default",
        "contiguous.default",
        "detach.default",
        "lift_fresh.default",
        "lift_fresh_copy.default",
        "_unsafe_view.default",
        "view.default",
        "reshape.default",
        "expand.default",
        "slice.Tensor",
        "squeeze.default",
        "squeeze.dim",
        "to.dtype",
        "to.dtype_layout",
        "to.device",
        "type_as.default",
        "_to_copy.default",
    )
)
"""Operators that only view, copy or cast: with equal operand and result types they do nothing."""

_UNIT = {
    "aten.add.Tensor": 0,
    "aten.add.Scalar": 0,
    "aten.sub.Tensor": 0,
    "aten.sub.Scalar": 0,
    "aten.mul.Tensor": 1,
    "aten.mul.Scalar": 1,
    "aten.div.Tensor": 1,
    "aten.div.Scalar": 1,
}
"""Operators that do nothing when their second argument is this number."""


def drop_unit_scale(place: Place) -> Outcome:
    """scale(x, 1) -> x."""
    node = place.node
    if node.op != "scale" or place.attr("factor") != 1:
        return False
    assert node.inputs[0] is not None
    return node.inputs[0]


def fold_scales(place: Place) -> Outcome:
    """scale(scale(x, a), b) -> scale(x, a b), where both are plain numbers."""
    node = place.node
    inner = place.maker(0, "scale") if node.op == "scale" else None
    if inner is None or any(isinstance(n.attrs["factor"], Param) for n in (node, inner)):
        return False
    node.attrs["factor"] *= inner.attrs["factor"]
    node.inputs = list(inner.inputs)
    return True


def cancel_swaps(place: Place) -> Outcome:
    """swap_heads(swap_heads(x)) -> x."""
    inner = place.maker(0, "swap_heads") if place.node.op == "swap_heads" else None
    if inner is None or inner.inputs[0] is None:
        return False
    return inner.inputs[0]


def absorb_swap(place: Place) -> Outcome:
    """Take a swap into the split before it or the merge after it."""
    node = place.node
    if node.op == "swap_heads":
        inner = place.maker(0, "split_heads")
        if inner is None or (swap := place.attr("swap", inner)) is NO_VALUE:
            return False
        node.op, node.attrs = "split_heads", {**inner.attrs, "swap": not swap}
    elif node.op == "merge_heads":
        inner = place.maker(0, "swap_heads")
        if inner is None or (swap := place.attr("swap")) is NO_VALUE:
            return False
        node.attrs = {**node.attrs, "swap": not swap}
    else:
        return False
    node.inputs = list(inner.inputs)
    return True


def heads_before_rope(place: Place) -> Outcome:
    """swap_heads(rope(x, heads_first=False)) -> rope(swap_heads(x)).

    The two nodes change places in the graph, so no value is made or lost.
    """
    swap = place.node
    rope = place.maker(0, "rope") if swap.op == "swap_heads" else None
    if rope is None or place.attr("heads_first", rope) is not False:
        return False
    function = place.function
    if len(function.uses()[rope.output]) != 1 or rope.output in function.outside_values():
        return False
    x, *tables = rope.inputs
    swap.op, swap.inputs = "rope", [rope.output, *tables]
    swap.attrs = {**rope.attrs, "heads_first": True}
    rope.op, rope.inputs, rope.attrs = "swap_heads", [x], {}
    for types in place.types:
        types[rope.output] = types[swap.output]
    return True


def cancel_split_merge(place: Place) -> Outcome:
    """merge_heads(split_heads(x)) -> x, and the other way round where the sizes agree."""
    node = place.node
    other = {"merge_heads": "split_heads", "split_heads": "merge_heads"}.get(node.op)
    inner = place.maker(0, other) if other else None
    if inner is None or inner.inputs[0] is None:
        return False
    swaps = place.attr("swap"), place.attr("swap", inner)
    if NO_VALUE in swaps or swaps[0] != swaps[1]:
        return False
    x = inner.inputs[0]
    return x if place.same_type(x, node.output) else False


def drop_dropout(place: Place) -> Outcome:
    """aten.dropout(x, p, train) -> x where it is off."""
    node = place.node
    if node.op != "aten.dropout.default":
        return False
    _, probability, train = node.attrs["args"]
    if train and probability != 0:
        return False
    assert node.inputs[0] is not None
    return node.inputs[0]


def drop_forwarding(place: Place) -> Outcome:
    """An ATen view, copy or cast to the type its operand has already -> its operand."""
    node = place.node
    if node.op not in _FORWARDING or node.attrs["args"][0] != In(0):
        return False
    x = node.inputs[0]
    assert x is not None
    return x if place.same_type(x, node.output) else False


def drop_unit_arithmetic(place: Place) -> Outcome:
    """x + 0, x - 0, x * 1, x / 1 in ATen -> x, where the type stays."""
    node = place.node
    args = node.attrs.get("args", [])
    if node.op not in _UNIT or len(args) < 2 or args[0] != In(0):
        return False
    number = args[1]
    if not isinstance(number, int | float) or number != _UNIT[node.op]:
        return False
    x = node.inputs[0]
    assert x is not None
    return x if place.same_type(x, node.output) else False


def order_operands(place: Place) -> Outcome:
    """a + b and a * b: what is made first stands first, weights stand last."""
    node = place.node
    if node.op not in ("add", "mul"):
        return False
    a, b = node.inputs
    assert a is not None and b is not None
    if place.order[a] <= place.order[b]:
        return False
    node.inputs = [b, a]
    return True


RULES: tuple[Callable[[Place], Outcome], ...] = (
    drop_unit_scale,
    fold_scales,
    cancel_swaps,
    absorb_swap,
    heads_before_rope,
    cancel_split_merge,
    drop_dropout,
    drop_forwarding,
    drop_unit_arithmetic,
    order_operands,
)


@register_pass
@dataclass
class Normalise(Pass):
    """Bring what can be written in several ways into one form.

    Products and sums get one operand order, moves of heads that undo each other vanish or are
    taken into their neighbours, factors are multiplied out, and operators that do nothing
    (dropout that is off, detach, casts to the same type, views to the same shape) are dropped.

    Legality:

    1. A node is replaced by an operand only if both have the same type in every call.
    2. An attribute that differs between calls is never folded.
    3. Two nodes change places only if nothing else reads the value between them.
    4. No weight is read or changed.
    """

    name: ClassVar[str] = "normalise"

    def run(self, program: Program, context: Context) -> PassResult:
        calls, types = calls_of(program), types_of(program)
        counts: dict[str, int] = {}
        for name, function in program.functions.items():
            if not calls[name]:
                continue
            dead = dead_nodes(function)
            for rule, count in _rewrite(function, calls[name], types[name]).items():
                counts[rule] = counts.get(rule, 0) + count * len(calls[name])
            drop_newly_dead(function, dead)
        total = sum(counts.values())
        return PassResult(program, total, total, details={"rules": counts})


def _rewrite(
    function: Function, calls: list[Call], types: list[dict[Value, Type]]
) -> dict[str, int]:
    """Apply the rules until none applies; return how often each did."""
    counts: dict[str, int] = {}
    dead = set(map(id, dead_nodes(function)))
    again = True
    while again:
        again = False
        order = _order(function)
        for node in function.nodes:
            for rule in RULES if id(node) not in dead else ():
                outcome = rule(Place(node, function, calls, types, order))
                if outcome is False:
                    continue
                if isinstance(outcome, Value):
                    function.replace(node.output, outcome)
                    dead.add(id(node))
                counts[rule.__name__] = counts.get(rule.__name__, 0) + 1
                again = True
                break
    return counts


def _order(function: Function) -> dict[Value, int]:
    """Rank of every value: parameters, node outputs as they are made, then weights."""
    values = list(function.params)
    for cache in function.caches:
        values += [cache.past_k, cache.past_v]
    for node in function.nodes:
        values += node.outputs
    values += function.weights.values()
    return {value: rank for rank, value in enumerate(values)}
