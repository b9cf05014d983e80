"""One form for what can be written in several ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.ir.graph import In, Param, Program
from graphopt.pass_manager.contract import Context, Pass, PassResult, register_pass
from graphopt.report.record import Record
from graphopt.rewrite import (
    VARIES,
    Match,
    NoMatch,
    Site,
    apply_rules,
    calls_of,
    rule,
    types_of,
)

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


@rule("scale")
def drop_unit_scale(site: Site) -> Match | NoMatch:
    """scale(x, 1) -> x."""
    if site.attr("factor") != 1:
        return site.no("its factor is not 1")
    return site.forward(site.operand(0))


@rule("scale")
def fold_scales(site: Site) -> Match | NoMatch:
    """scale(scale(x, a), b) -> scale(x, a b), where both are plain numbers."""
    node, inner = site.node, site.maker(0, "scale")
    if inner is None:
        return site.no("what it scales is not scaled")
    for scale in (node, inner):
        if isinstance(scale.attrs["factor"], Param):
            return site.no("its factor is set by the calls", scale)
    factor = node.attrs["factor"] * inner.attrs["factor"]
    return site.change("scale", inner.inputs, {"factor": factor})


@rule("transpose_heads")
def cancel_swaps(site: Site) -> Match | NoMatch:
    """transpose_heads(transpose_heads(x)) -> x."""
    inner = site.maker(0, "transpose_heads")
    if inner is None:
        return site.no("its operand is not swapped")
    return site.forward(inner.inputs[0])


@rule("transpose_heads", "merge_heads")
def absorb_swap(site: Site) -> Match | NoMatch:
    """Take a swap into the split before it or the merge after it."""
    node = site.node
    swapping = node.op == "transpose_heads"
    inner = site.maker(0, "split_heads" if swapping else "transpose_heads")
    if inner is None:
        return site.no("there is no split to swap, or swap to merge")
    absorbing = inner if swapping else node
    swap = site.attr("swap", absorbing)
    if swap is VARIES:
        return site.no("whether it swaps differs between the calls", absorbing)
    op = "split_heads" if swapping else "merge_heads"
    return site.change(op, inner.inputs, {**absorbing.attrs, "swap": not swap})


@rule("transpose_heads")
def heads_before_rope(site: Site) -> Match | NoMatch:
    """transpose_heads(rope(x, heads_first=False)) -> rope(transpose_heads(x)).

    The two nodes change places in the graph, so no value is made or lost.
    """
    swap, rope = site.node, site.maker(0, "rope")
    if rope is None or site.attr("heads_first", rope) is not False:
        return site.no("its operand is no rotation with heads behind tokens")
    if site.only_reader(rope.output) is not swap:
        return site.no("something else reads the rotation", rope)
    rotation = rope

    def rewrite() -> None:
        x, *tables = rotation.inputs
        swap.op, swap.inputs = "rope", [rotation.output, *tables]
        swap.attrs = {**rotation.attrs, "heads_first": True}
        rotation.op, rotation.inputs, rotation.attrs = "transpose_heads", [x], {}
        for types in site.types:
            types[rotation.output] = types[swap.output]

    return Match(rewrite)


@rule("merge_heads", "split_heads")
def cancel_split_merge(site: Site) -> Match | NoMatch:
    """merge_heads(split_heads(x)) -> x, and the other way round where the sizes agree."""
    node = site.node
    inner = site.maker(0, "split_heads" if node.op == "merge_heads" else "merge_heads")
    if inner is None:
        return site.no("its operand is not the other one")
    swaps = site.attr("swap"), site.attr("swap", inner)
    if VARIES in swaps or swaps[0] != swaps[1]:
        return site.no("one of them swaps and the other does not", inner)
    x = inner.inputs[0]
    assert x is not None
    if not site.same_type(x, node.output):
        return site.no("the sizes of heads differ", inner)
    return site.forward(x)


@rule("aten.dropout.default")
def drop_dropout(site: Site) -> Match | NoMatch:
    """aten.dropout(x, p, train) -> x where it is off."""
    _, probability, train = site.node.attrs["args"]
    if train and probability != 0:
        return site.no("it is on")
    return site.forward(site.operand(0))


@rule(*_FORWARDING)
def drop_forwarding(site: Site) -> Match | NoMatch:
    """An ATen view, copy or cast to the type its operand has already -> its operand."""
    node, x = site.node, site.operand(0)
    if node.attrs["args"][0] != In(0) or x is None:
        return site.no("its first argument is no tensor")
    if not site.same_type(x, node.output):
        return site.no("it changes the type")
    return site.forward(x)


@rule(*_UNIT)
def drop_unit_arithmetic(site: Site) -> Match | NoMatch:
    """x + 0, x - 0, x * 1, x / 1 in ATen -> x, where the type stays."""
    node, x = site.node, site.operand(0)
    args = node.attrs.get("args", [])
    if len(args) < 2 or args[0] != In(0) or x is None:
        return site.no("its first argument is no tensor")
    number = args[1]
    if not isinstance(number, int | float) or number != _UNIT[node.op]:
        return site.no(f"its second argument is not {_UNIT[node.op]}")
    if not site.same_type(x, node.output):
        return site.no("it changes the type")
    return site.forward(x)


@rule("add", "mul")
def order_operands(site: Site) -> Match | NoMatch:
    """a + b and a * b: what is made first stands first, weights stand last."""
    a, b = site.node.inputs
    assert a is not None and b is not None
    if site.order[a] <= site.order[b]:
        return site.no("its operands are in order")
    return site.change(site.node.op, [b, a])


RULES = (
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


class AppliedRules(Record):
    """How often each rule was applied, over all calls."""

    rules: dict[str, int]


@register_pass
@dataclass
class Canonicalise(Pass):
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

    name: ClassVar[str] = "canonicalise"
    record: ClassVar[type[Record]] = AppliedRules

    def run(self, program: Program, context: Context) -> PassResult:
        calls, types = calls_of(program), types_of(program)
        counts: dict[str, int] = {}
        for name, function in program.functions.items():
            times = len(calls[name])
            if not times:
                continue
            rewritten = apply_rules(function, RULES, calls[name], types[name])
            for applied, count in rewritten.counts.items():
                counts[applied] = counts.get(applied, 0) + count * times
        total = sum(counts.values())
        return PassResult(program, total, total, record=AppliedRules(rules=counts))
