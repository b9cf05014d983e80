"""Attention: GroupQueryAttention where it is exact, plain products and a softmax elsewhere.

ONNX Runtime's standard Attention is much slower on a CPU, and GroupQueryAttention alone extends a
cache in place.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.graph import Node, Value
from graphopt.ir.ops.attention import BIAS, KEY, MASK, PAST_K, PAST_V, QUERY, SINKS, SLOPES, VALUE
from graphopt.ir.types import B, P, S
from graphopt.lowering.onnx.builder import MICROSOFT
from graphopt.lowering.onnx.kv_policies.frame import BLOCKED, write_tokens
from graphopt.lowering.onnx.ops.registry import Heads, Lowered, Lowering, translation


@translation("split_heads")
def split_heads(lower: Lowering, node: Node) -> Heads:
    attrs = lower.attrs(node)
    x = node.inputs[0]
    assert x is not None
    width = int(lower.types[x].shape[-1])
    return Heads(
        lower.whole(x), width // attrs["head_dim"], attrs["head_dim"], attrs.get("swap", True)
    )


@translation("transpose_heads")
def transpose_heads(lower: Lowering, node: Node) -> Lowered:
    x = node.inputs[0]
    assert x is not None
    lowered = lower.values[x]
    if isinstance(lowered, Heads):
        return Heads(lowered.flat, lowered.heads, lowered.dim, not lowered.heads_first)
    return lower.builder.op("Transpose", lower.whole(x), perm=[0, 2, 1, 3])


@translation("merge_heads")
def merge_heads(lower: Lowering, node: Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    lowered, swap = lower.values[x], lower.attrs(node).get("swap", True)
    if isinstance(lowered, Heads) and lowered.heads_first == swap:
        return lowered.flat
    builder, whole = lower.builder, lower.whole(x)
    if swap:
        whole = builder.op("Transpose", whole, perm=[0, 2, 1, 3])
    width = lower.types[node.output].shape[-1]
    # What an indexer of sparse attention merges may be as wide as the text is long.
    return builder.op(
        "Reshape", whole, builder.constant([0, 0, width if isinstance(width, int) else -1])
    )


def padding_mask(lower: Lowering, mask: Value | None) -> ir.Value:
    """Return the padding mask as int64 [B, T], ones where the program has none."""
    if mask is not None:
        return lower.whole(mask)
    key = "ones"
    if key not in lower.shared:
        builder = lower.builder
        shape = builder.shape([B, P + S])
        ones = ir.tensor(np.ones(1, dtype=np.int64))
        lower.shared[key] = builder.op("ConstantOfShape", shape, value=ones)
    return lower.shared[key]


def attention_bias(
    lower: Lowering,
    mask: Value | None,
    slopes: Value | None,
    causal: bool,
    window: int | None,
    chunk: int | None,
) -> ir.Value:
    """Return the additive form of which keys are seen, [B, 1 or H, S, T]; made once a graph.

    ALiBi's bias is part of it.
    """
    builder = lower.builder
    key_mask = padding_mask(lower, mask)
    slope_values = None if slopes is None else lower.whole(slopes)
    key = ("bias", key_mask, slope_values, causal, window, chunk)
    if key in lower.shared:
        return lower.shared[key]
    scope, builder.scope = builder.scope, "mask"
    allowed = builder.op("Cast", key_mask, to=ir.DataType.BOOL)
    allowed = builder.op("Unsqueeze", allowed, builder.constant([1, 2]))
    zero, one = builder.constant(0), builder.constant(1)
    keys = builder.op("Range", zero, builder.scalar(P + S), one)
    queries = builder.op("Range", builder.scalar(P), builder.scalar(P + S), one)
    queries = builder.op("Unsqueeze", queries, builder.constant([1]))
    if causal:
        allowed = builder.op("And", allowed, builder.op("LessOrEqual", keys, queries))
    if window is not None:
        first = builder.op("Sub", queries, builder.constant(window))
        allowed = builder.op("And", allowed, builder.op("Greater", keys, first))
    if chunk is not None:
        length = builder.constant(chunk)
        own = builder.op("Div", queries, length)
        allowed = builder.op(
            "And", allowed, builder.op("Equal", builder.op("Div", keys, length), own)
        )
    bias = builder.op("Where", allowed, builder.number(0.0), builder.number(BLOCKED))
    if slope_values is not None:
        real = builder.op("Cast", key_mask, to=ir.DataType.FLOAT)
        count = builder.op("CumSum", real, builder.constant(1))
        positions = builder.op("Mul", builder.op("Sub", count, builder.number(1.0)), real)
        positions = builder.op("Unsqueeze", positions, builder.constant([1, 2]))
        per_head = builder.op("Unsqueeze", slope_values, builder.constant([1, 2]))
        bias = builder.op("Add", bias, builder.op("Mul", per_head, positions))
    if not (causal or window is not None or chunk is not None):
        ones = builder.shape([1, 1, S, 1])
        bias = builder.op("Expand", bias, ones)
    builder.scope = scope
    lower.shared[key] = bias
    return bias


def lengths(lower: Lowering) -> tuple[ir.Value, ir.Value]:
    """Return seqlens_k int32 [B] and the total length int32 scalar, for all rows alike.

    Rows are padded on the left and masked by the bias, so every row has all T keys; the total
    comes from the mask, since a shared cache buffer is longer than what it holds.
    """
    if "lengths" not in lower.shared:
        builder = lower.builder
        scope, builder.scope = builder.scope, "mask"
        total = builder.op("Cast", builder.scalar(P + S), to=ir.DataType.INT32)
        last = builder.op("Sub", total, builder.constant(1, np.int32))
        lower.shared["lengths"] = builder.op("Expand", last, builder.size(B)), total
        builder.scope = scope
    return lower.shared["lengths"]


@translation("attention")
def attention(lower: Lowering, node: Node) -> Lowered | list[Lowered]:
    if not fits_group_query(lower, node):
        made = _plain(lower, node, [lower.whole(node.inputs[i]) for i in (QUERY, KEY, VALUE)])
        return [*made] if isinstance(made, list) else made
    builder = lower.builder
    q, k, v = (lower.heads(node.inputs[i]) for i in (QUERY, KEY, VALUE))
    continues = bool(lower.shared["continues"])
    # The fused operator is causal of itself; the products of the other branch are not.
    bias = attention_bias(
        lower, node.operand(MASK), node.operand(SLOPES), continues,
        lower.attrs(node).get("window"), lower.attrs(node).get("chunk"),
    )  # fmt: skip
    if not continues:
        out, *present = group_query(lower, node, q, k, v, bias)
        return [Heads(out, q.heads, v.dim, True), *present]
    several = several_rows_continue(lower)
    lengths(lower)
    with builder.branch("continue") as plain:
        # Copies: what this branch makes of the heads must not be read outside of it.
        inside = [Heads(x.flat, x.heads, x.dim, True).whole(builder) for x in (q, k, v)]
        out, present_k, present_v = _plain(lower, node, inside)  # type: ignore[misc]
        flat = builder.op("Transpose", out, perm=[0, 2, 1, 3])
        flat = builder.op("Reshape", flat, builder.constant([0, 0, q.heads * v.dim]))
        plain.results = [flat, present_k, present_v]
    with builder.branch("fused") as fused:
        fused.results = group_query(lower, node, q, k, v, bias)
    out, *present = builder.op(
        "If", several, outputs=3, then_branch=plain.graph(), else_branch=fused.graph()
    )
    return [Heads(out, q.heads, v.dim, True), *present]


def several_rows_continue(lower: Lowering) -> ir.Value:
    """Return whether several rows go on from a cache by several tokens, a bool scalar.

    ONNX Runtime's GroupQueryAttention refuses that one case.
    """
    if "several" not in lower.shared:
        builder = lower.builder
        scope, builder.scope = builder.scope, "mask"
        rows, tokens, past = (
            builder.op("Greater", builder.scalar(size), builder.constant(limit))
            for size, limit in ((B, 1), (S, 1), (P, 0))
        )
        lower.shared["several"] = builder.op("And", builder.op("And", rows, tokens), past)
        builder.scope = scope
    return lower.shared["several"]


def fits_group_query(lower: Lowering, node: Node) -> bool:
    """GroupQueryAttention is causal, has a cache, and one head size for keys and values."""
    q, k, v = (node.inputs[i] for i in (QUERY, KEY, VALUE))
    assert q is not None and k is not None and v is not None
    attrs = lower.attrs(node)
    return bool(
        attrs["causal"]
        and node.operand(PAST_K) is not None
        and node.operand(BIAS) is None
        and lower.types[k].shape[3] == lower.types[v].shape[3]
        and int(lower.types[q].shape[3]) % 8 == 0
    )


def group_query(
    lower: Lowering, node: Node, q: Heads, k: Heads, v: Heads, bias: ir.Value
) -> list[ir.Value]:
    """Return the flat output and the new cache contents.

    Queries and keys come rotated. The operator would rotate them itself, but by other positions:
    without a past, every row by the first row's first position and those that follow it, which
    is right for no batch that is padded on the left.
    """
    attrs = lower.attrs(node)
    last, total = lengths(lower)
    sinks = node.operand(SINKS)
    past = [lower.whole(node.operand(index)) for index in (PAST_K, PAST_V)]
    return lower.builder.op(
        "GroupQueryAttention",
        q.flat, k.flat, v.flat, *past, last, total, None, None, None, bias,
        None if sinks is None else lower.whole(sinks),
        domain=MICROSOFT, outputs=3,
        num_heads=q.heads, kv_num_heads=k.heads, scale=attrs["scale"],
        softcap=attrs.get("softcap"), do_rotary=0,
    )  # fmt: skip


def _plain(lower: Lowering, node: Node, operands: list[ir.Value]) -> ir.Value | list[ir.Value]:
    """Products and a softmax, for what no fused kernel does.

    Args:
        operands: q, k and v as [B, heads, S, head_dim].
    """
    query, keys, values = operands
    past = node.operand(PAST_K)
    if past is not None:
        lower.shared["in_place"] = False
        present = [
            _extended(lower, node.operand(place), new)
            for place, new in ((PAST_K, keys), (PAST_V, values))
        ]
        (whole_k, keys), (whole_v, values) = present
    out = over_keys(lower, node, query, keys, values)
    return out if past is None else [out, whole_k, whole_v]


def _extended(lower: Lowering, past: Value | None, new: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return a cache with new rows, and its T rows that hold tokens."""
    assert past is not None
    builder, before = lower.builder, lower.whole(past)
    if not lower.shared.get("room"):
        both = builder.op("Concat", before, new, axis=2)
        return both, both
    # Made anew in each branch: what one computes is not seen by another.
    whole = write_tokens(builder, {}, before, new, int(lower.types[past].shape[1]))
    total = builder.size(P + S)
    return whole, builder.op("Slice", whole, builder.constant([0]), total, builder.constant([2]))


def over_keys(
    lower: Lowering, node: Node, query: ir.Value, keys: ir.Value, values: ir.Value
) -> ir.Value:
    """Return an attention [B, H, S, Dv] over all keys [B, G, T, D], by products and a softmax."""
    builder, attrs = lower.builder, lower.attrs(node)
    q, k, v = (node.inputs[i] for i in (QUERY, KEY, VALUE))
    assert q is not None and k is not None and v is not None
    heads, groups = int(lower.types[q].shape[1]), int(lower.types[k].shape[1])
    widths = int(lower.types[q].shape[3]), int(lower.types[v].shape[3])
    share = heads // groups
    if share > 1:
        # Heads of a group as rows of one product, so that keys are not repeated.
        query = builder.op("Reshape", query, builder.constant([0, groups, -1, widths[0]]))
    scores = builder.op("MatMul", query, builder.op("Transpose", keys, perm=[0, 1, 3, 2]))
    scores = builder.op("Mul", scores, builder.number(attrs["scale"]))
    if share > 1:
        scores = builder.op("Reshape", scores, builder.shape([-1, heads, S, P + S]))
    cap = attrs.get("softcap")
    if cap is not None:
        scores = builder.op("Div", scores, builder.number(cap))
        scores = builder.op("Mul", builder.op("Tanh", scores), builder.number(cap))
    scores = builder.op(
        "Add",
        scores,
        attention_bias(
            lower, node.operand(MASK), node.operand(SLOPES), attrs["causal"],
            attrs.get("window"), attrs.get("chunk"),
        ),
    )  # fmt: skip
    extra = node.operand(BIAS)
    if extra is not None:
        floor = builder.number(BLOCKED)
        scores = builder.op("Add", scores, builder.op("Max", lower.whole(extra), floor))
    sinks = node.operand(SINKS)
    if sinks is not None:
        column = builder.op("Reshape", lower.whole(sinks), builder.constant([1, heads, 1, 1]))
        rows = builder.op("Slice", scores, *(builder.constant([x]) for x in (0, 1, 3)))
        zero = builder.op("Mul", rows, builder.number(0.0))
        scores = builder.op("Concat", scores, builder.op("Add", zero, column), axis=3)
    weights = builder.op("Softmax", scores, axis=-1)
    if sinks is not None:
        weights = builder.op("Slice", weights, *(builder.constant([x]) for x in (0, -1, 3)))
    if share > 1:
        weights = builder.op("Reshape", weights, builder.shape([-1, groups, share * S, P + S]))
    out = builder.op("MatMul", weights, values)
    if share > 1:
        out = builder.op("Reshape", out, builder.shape([-1, heads, S, widths[1]]))
    return out  # type: ignore[no-any-return]
