"""Attention whose steps read the pages that a policy selects, in standard operators.

A graph decides when it runs whether one token follows others: then pages are selected and gathered,
else all keys are read and the policy's state is made anew. Both are branches of an If; what the
policy remembers comes in and goes out as inputs and outputs of the graph.

Letters: B batch, G key heads, H query heads, T keys, N pages, M pages that are read, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from graphopt.ir.graph import Node
from graphopt.ir.kv_policies import KVPolicy
from graphopt.ir.ops.attention import KEY, MASK, PAST_K, PAST_V, QUERY, SINKS, VALUE
from graphopt.ir.ops.policy_attention import STATE
from graphopt.ir.types import B, P, S
from graphopt.lowering.onnx.ops.attention import (
    BLOCKED,
    attention_bias,
    fits_group_query,
    group_query,
    lengths,
    over_keys,
    padding_mask,
    several_rows_continue,
)
from graphopt.lowering.onnx.ops.registry import Heads, Lowering, translation


def refusal(policy: KVPolicy) -> str | None:
    """Return why graphs do not have a policy, as a clause; None where they do."""
    if policy.kind in _SELECTIONS:
        return None
    return f"graphs have the policies {', '.join(sorted(_SELECTIONS))}, and this is {policy.kind}"


@translation("policy_attention")
def policy_attention(lower: Lowering, node: Node) -> list[ir.Value]:
    builder, attrs = lower.builder, lower.attrs(node)
    lower.shared["in_place"] = False
    heads = [lower.heads(node.inputs[place]) for place in (QUERY, KEY, VALUE)]
    q, k, v = (lower.whole(node.inputs[place]) for place in (QUERY, KEY, VALUE))
    keys = builder.op("Concat", lower.whole(node.operand(PAST_K)), k, axis=2)
    values = builder.op("Concat", lower.whole(node.operand(PAST_V)), v, axis=2)
    state = [lower.whole(value) for value in node.inputs[STATE:]]
    mask = padding_mask(lower, node.operand(MASK))
    # Made here, where both branches and other layers see them.
    bias = attention_bias(lower, node.operand(MASK), None, attrs["causal"], None, None)
    several = several_rows_continue(lower)
    lengths(lower)
    places = _places(lower, mask, attrs["policy"].budget.page)
    if node.operand(SINKS) is not None:
        lower.whole(node.operand(SINKS))
    alone = _alone(lower)
    selection = _SELECTIONS[attrs["policy"].kind](lower, node, places)
    with builder.branch("step") as step:
        left, scores = selection.step(q, k, state)
        selected = _select(lower, scores, places, attrs["policy"])
        step.results = [_over_pages(lower, node, q, keys, values, mask, selected), *left]
    with builder.branch("prompt") as prompt:
        if fits_group_query(lower, node):
            whole = _fused(lower, node, heads, (q, keys, values), bias, several)
        else:
            whole = over_keys(lower, node, q, keys, values)
        prompt.results = [whole, *selection.begin(keys, mask)]
    made = builder.op(
        "If", alone, outputs=1 + len(state), then_branch=step.graph(), else_branch=prompt.graph()
    )
    out, *left = made if isinstance(made, list) else [made]
    return [out, keys, values, *left]


def _fused(
    lower: Lowering,
    node: Node,
    heads: list[Heads],
    operands: tuple[ir.Value, ir.Value, ir.Value],
    bias: ir.Value,
    several: ir.Value,
) -> ir.Value:
    """Return the attention [B, H, S, Dv] of a prompt by the fused operator, where that takes it.

    Args:
        heads: Queries, and the new keys and values.
        operands: Queries, and all keys and values, as tensors of four dimensions.
        several: Whether several rows go on by several tokens, which the operator refuses.
    """
    builder, (q, k, v) = lower.builder, heads
    with builder.branch("continue") as plain:
        plain.results = [over_keys(lower, node, *operands)]
    with builder.branch("fused") as fused:
        flat, *_ = group_query(lower, node, q, k, v, bias)
        out = builder.op("Reshape", flat, builder.constant([0, 0, q.heads, v.dim]))
        fused.results = [builder.op("Transpose", out, perm=[0, 2, 1, 3])]
    return builder.op(  # type: ignore[no-any-return]
        "If", several, then_branch=plain.graph(), else_branch=fused.graph()
    )


class _Places:
    """Where the keys of a step lie, made once for all layers with pages of one size.

    Attributes:
        first, last: int64 [B, 1, 1], the slots of the first and of the last real key.
        pages: N, int64 [1].
        number: int64 [N].
    """

    def __init__(self, lower: Lowering, mask: ir.Value, page: int) -> None:
        builder = lower.builder
        self.page = builder.constant(page)
        first = builder.op("ArgMax", mask, axis=1, keepdims=1)
        last = builder.op("ArgMax", mask, axis=1, keepdims=1, select_last_index=1)
        self.first, self.last = (
            builder.op("Unsqueeze", x, builder.constant([2])) for x in (first, last)
        )
        tokens = builder.scalar(P + S)
        total = builder.op("Add", tokens, builder.constant(page - 1))
        count = builder.op("Div", total, self.page)
        self.pages = builder.op("Unsqueeze", count, builder.constant([0]))
        self.number = builder.op("Range", builder.constant(0), count, builder.constant(1))
        room = builder.op("Mul", self.pages, self.page)
        self.behind = builder.op("Sub", room, builder.size(P + S))
        self.first_page, self.last_page = (
            builder.op("Div", x, self.page) for x in (self.first, self.last)
        )


def _places(lower: Lowering, mask: ir.Value, page: int) -> _Places:
    key = ("pages", mask, page)
    if key not in lower.shared:
        scope, lower.builder.scope = lower.builder.scope, "pages"
        lower.shared[key] = _Places(lower, mask, page)
        lower.builder.scope = scope
    made: _Places = lower.shared[key]
    return made


def _alone(lower: Lowering) -> ir.Value:
    """Return whether one token follows others, a bool scalar."""
    if "alone" not in lower.shared:
        builder = lower.builder
        scope, builder.scope = builder.scope, "pages"
        one = builder.op("Equal", builder.scalar(S), builder.constant(1))
        follows = builder.op("Greater", builder.scalar(P), builder.constant(0))
        lower.shared["alone"] = builder.op("And", one, follows)
        builder.scope = scope
    made: ir.Value = lower.shared["alone"]
    return made


class _SinkLocal:
    """The newest pages."""

    def __init__(self, lower: Lowering, node: Node, places: _Places) -> None:
        self.lower, self.node, self.places = lower, node, places
        self.builder = lower.builder

    def step(
        self, q: ir.Value, k: ir.Value, state: list[ir.Value]
    ) -> tuple[list[ir.Value], ir.Value]:
        """Return the state with the new key, and the scores of all pages, [B or 1, G or 1, N]."""
        number = self.builder.op("Cast", self.places.number, to=ir.DataType.FLOAT)
        return [], self.builder.op("Unsqueeze", number, self.builder.constant([0, 1]))

    def begin(self, keys: ir.Value, mask: ir.Value) -> list[ir.Value]:
        """Return the state behind a prompt."""
        return []


class _Quest(_SinkLocal):
    """The bounds of the keys of each page; see `graphopt.ir.kv_policies.quest`."""

    def step(
        self, q: ir.Value, k: ir.Value, state: list[ir.Value]
    ) -> tuple[list[ir.Value], ir.Value]:
        op, constant, places = self.builder.op, self.builder.constant, self.places
        missing = op("Sub", places.pages, op("Shape", state[0], start=2, end=3))
        pads = op("Concat", constant([0] * 6), missing, constant([0]), axis=0)
        # The page of the new key, and whether that is the page's first.
        here = op("Equal", places.number, places.last_page)  # [B, 1, N]
        here = op("Unsqueeze", here, constant([3]))
        opens = op("Equal", op("Mod", places.last, places.page), constant(0))
        opens = op("Or", opens, op("Equal", places.last, places.first))
        opens = op("Unsqueeze", opens, constant([3]))
        after: list[ir.Value] = []
        for known, bound in zip(state, ("Min", "Max"), strict=True):
            known = op("Pad", known, pads)
            both = op("Where", opens, k, op(bound, known, k))
            after.append(op("Where", here, both, known))
        zero = self.builder.number(0.0)
        groups = int(self.lower.types[self.node.inputs[KEY]].shape[1])  # type: ignore[index]
        width = int(self.lower.types[self.node.inputs[QUERY]].shape[3])  # type: ignore[index]
        rows = op("Reshape", q, constant([0, groups, -1, width]))
        products = [
            op("MatMul", op(part, rows, zero), op("Transpose", side, perm=[0, 1, 3, 2]))
            for part, side in zip(("Min", "Max"), after, strict=True)
        ]
        bound = op("ReduceMax", op("Add", *products), constant([2]), keepdims=0)
        return after, bound

    def begin(self, keys: ir.Value, mask: ir.Value) -> list[ir.Value]:
        op, constant, places = self.builder.op, self.builder.constant, self.places
        page = int(self.lower.attrs(self.node)["policy"].budget.page)
        width = int(self.lower.types[self.node.inputs[KEY]].shape[3])  # type: ignore[index]
        behind = places.behind
        padded = op("Pad", keys, op("Concat", constant([0] * 6), behind, constant([0]), axis=0))
        batch, heads = (op("Shape", keys, start=axis, end=axis + 1) for axis in (0, 1))
        shape = op("Concat", batch, heads, places.pages, constant([page, width]), axis=0)
        padded = op("Reshape", padded, shape)
        real = op("Pad", mask, op("Concat", constant([0, 0, 0]), behind, axis=0))
        rows = op("Concat", batch, constant([1]), places.pages, constant([page, 1]), axis=0)
        real = op("Cast", op("Reshape", real, rows), to=ir.DataType.BOOL)
        some = op("Cast", real, to=ir.DataType.FLOAT)
        some = op("ReduceMax", some, constant([3]), keepdims=0)
        some = op("Cast", some, to=ir.DataType.BOOL)
        zero, made = self.builder.number(0.0), list[ir.Value]()
        for reduce, never in (("ReduceMin", float("inf")), ("ReduceMax", float("-inf"))):
            bounded = op("Where", real, padded, self.builder.number(never))
            bounded = op(reduce, bounded, constant([3]), keepdims=0)
            made.append(op("Where", some, bounded, zero))
        return made


_SELECTIONS: dict[str, Callable[[Lowering, Node, _Places], _SinkLocal]] = {
    "quest": _Quest, "sink-local": _SinkLocal,
}  # fmt: skip


def _select(lower: Lowering, scores: ir.Value, places: _Places, policy: KVPolicy) -> ir.Value:
    """Return the pages that are read, int64 [B, G or 1, min(M, N)]; -1 names none.

    Of equal scores TopK takes the first, as `graphopt.ir.kv_policies.pages.select_pages` does.
    """
    builder, budget = lower.builder, policy.budget
    op, constant, number = builder.op, builder.constant, places.number
    first, last = places.first_page, places.last_page
    never, always = builder.number(float("-inf")), builder.number(float("inf"))
    present = op("And", op("GreaterOrEqual", number, first), op("LessOrEqual", number, last))
    sink = op("Less", number, op("Add", first, constant(budget.sink)))
    local = op("Greater", number, op("Sub", last, constant(budget.local)))
    few = op("Less", op("Sub", last, first), constant(budget.pages))
    taken = op("Or", op("Or", sink, local), few)
    rank = op("Where", present, op("Where", taken, always, scores), never)
    most = op("Min", places.pages, constant([budget.pages]))
    best, page = op("TopK", rank, most, outputs=2, axis=-1)
    return op("Where", op("Equal", best, never), constant(-1), page)  # type: ignore[no-any-return]


def _over_pages(
    lower: Lowering,
    node: Node,
    q: ir.Value,
    keys: ir.Value,
    values: ir.Value,
    mask: ir.Value,
    selected: ir.Value,
) -> ir.Value:
    """Return the attention [B, H, 1, Dv] of one token over pages that are gathered."""
    builder, attrs = lower.builder, lower.attrs(node)
    op, constant, page = builder.op, builder.constant, int(attrs["policy"].budget.page)
    types = [lower.types[node.inputs[place]] for place in (QUERY, KEY, VALUE)]  # type: ignore[index]
    heads, groups = int(types[0].shape[1]), int(types[1].shape[1])
    width, value_width = int(types[0].shape[3]), int(types[2].shape[3])
    shape = op("Concat", builder.size(B), constant([groups, 1]), axis=0)
    selected = op("Expand", selected, shape)
    start = op("Unsqueeze", op("Mul", selected, constant(page)), constant([3]))
    slots = op("Add", start, constant(list(range(page))))
    slots = op("Reshape", slots, constant([0, 0, -1]))  # [B, G, M page]
    real = op("GreaterOrEqual", slots, constant(0))
    real = op("And", real, op("Less", slots, builder.scalar(P + S)))
    last = op("Sub", builder.scalar(P + S), constant(1))
    slots = op("Min", op("Max", slots, constant(0)), last)
    index = op("Unsqueeze", slots, constant([3]))
    k, v = (op("GatherND", x, index, batch_dims=2) for x in (keys, values))
    flat = op("Reshape", slots, constant([0, -1, 1]))
    seen = op("GatherND", mask, flat, batch_dims=1)
    seen = op("Reshape", seen, op("Shape", slots))
    real = op("And", real, op("Cast", seen, to=ir.DataType.BOOL))
    bias = op("Where", real, builder.number(0.0), builder.number(BLOCKED))
    rows = op("Reshape", q, constant([0, groups, heads // groups, width]))
    scores = op("MatMul", rows, op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = op("Mul", scores, builder.number(attrs["scale"]))
    cap = attrs.get("softcap")
    if cap is not None:
        scores = op("Mul", op("Tanh", op("Div", scores, builder.number(cap))), builder.number(cap))
    scores = op("Add", scores, op("Unsqueeze", bias, constant([2])))
    sinks = node.operand(SINKS)
    if sinks is not None:
        column = op("Reshape", lower.whole(sinks), constant([1, groups, heads // groups, 1]))
        sizes = op("Concat", builder.size(B), constant([groups, heads // groups, 1]), axis=0)
        scores = op("Concat", scores, op("Expand", column, sizes), axis=3)
    weights = op("Softmax", scores, axis=-1)
    if sinks is not None:
        weights = op("Slice", weights, *(constant([x]) for x in (0, -1, 3)))
    out = op("MatMul", weights, v)
    return op("Reshape", out, constant([0, heads, 1, value_width]))  # type: ignore[no-any-return]
