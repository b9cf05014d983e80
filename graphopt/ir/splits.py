"""Which axes of a node's operands and results are split over ranks together.

Where a value is split along an axis, a node that reads it can do with a rank's part if there is an
alignment: what else it reads is split along the axes that go with that one, and its results along
theirs, or they are partial sums. Nothing is said here about which values are split.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from graphopt.ir.aten_splits import aten_alignments, aten_keeps_sums, aten_local_attrs
from graphopt.ir.graph import Node
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.attention import (
    BIAS,
    KEY,
    PAST_K,
    PAST_V,
    QUERY,
    SELECTED,
    SINKS,
    SLOPES,
    VALUE,
)
from graphopt.ir.ops.base import Attrs
from graphopt.ir.ops.elementwise import Binary, Unary
from graphopt.ir.split import Alignment, Kinds, Layout, Split, pointwise


def alignments(
    op: str, attrs: Attrs, operands: Kinds, results: Kinds, ranks: int
) -> Iterator[Alignment]:
    """Yield the ways in which a node does with parts of what it reads.

    Args:
        attrs: The node's, as a call gives them.
        operands, results: Types of the whole values.
        ranks: How many ranks there are.
    """
    if is_aten(op):
        yield from aten_alignments(op, attrs, operands, results)
    elif isinstance(get_op(op), Unary | Binary):
        yield from pointwise(operands, results)
    elif op in _RULES:
        yield from _RULES[op](attrs, operands, results, ranks)


def _norm(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    yield from pointwise(operands, results, fixed=1)


def _mean_square(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    x = operands[0]
    assert x is not None
    yield Alignment({0: Split(len(x.shape) - 1)}, sums=(0,))
    yield from pointwise(operands, results, fixed=1)


def _norm_by(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    yield from pointwise(operands, results)


def _kronecker(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    x, left, right = (*operands, None, None)[:3]
    assert x is not None
    yield from pointwise(operands, results, fixed=1, places=(0,))
    if left is None and right is not None:
        last = Split(len(x.shape) - 1)
        yield Alignment({0: last}, {0: last}, unit=int(right.shape[0]))


def _linear(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    x, _, bias = (*operands, None)[:3]
    assert x is not None
    last = len(x.shape) - 1
    rows = {1: Split(0)} if bias is None else {1: Split(0), 2: Split(0)}
    yield Alignment(rows, {0: Split(last)})
    yield Alignment({0: Split(last), 1: Split(1)}, sums=(0,))
    yield from pointwise(operands, results, fixed=1, places=(0,))


def _embedding(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    made = results[0]
    assert made is not None
    yield Alignment({1: Split(1)}, {0: Split(len(made.shape) - 1)})


def _vocabulary(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    yield Alignment({1: Split(0), 2: Split(0)}, sums=(0,))


def _rope(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    yield from pointwise(operands, results, fixed=1, places=(0,))


def _split_heads(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    yield Alignment({0: Split(2)}, {0: Split(1 if attrs.get("swap", True) else 2)})


def _merge_heads(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    yield Alignment({0: Split(1 if attrs.get("swap", True) else 2)}, {0: Split(2)})


def _transpose_heads(
    attrs: Attrs, operands: Kinds, results: Kinds, ranks: int
) -> Iterator[Alignment]:
    yield Alignment({0: Split(1)}, {0: Split(2)})
    yield Alignment({0: Split(2)}, {0: Split(1)})
    yield Alignment({0: Split(3)}, {0: Split(3)})


def _attention(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    q, k = operands[QUERY], operands[KEY]
    assert q is not None and k is not None
    heads, key_heads = int(q.shape[1]), int(k.shape[1])
    copies = ranks // key_heads if key_heads < ranks and ranks % key_heads == 0 else 1
    by_head, by_key_head = Split(1), Split(1, copies=copies)
    shared = (KEY, VALUE, PAST_K, PAST_V, SELECTED) if key_heads > 1 else ()
    members: dict[int, Split] = {}
    for place, kind in enumerate(operands):
        if kind is None:
            continue
        if place == QUERY:
            members[place] = by_head
        elif place == BIAS and len(kind.shape) > 2 and kind.shape[-3] == heads > 1:
            members[place] = Split(len(kind.shape) - 3)
        elif place in (SLOPES, SINKS):
            members[place] = Split(0)
        elif place in shared and kind.shape[1] == key_heads:
            members[place] = by_key_head  # a single key head is whole on every rank
    # Behind the output lie keys and values, and behind these what there is of each query head.
    kept = (1, 2) if len(operands) > PAST_V and operands[PAST_V] is not None else ()
    made = {place: by_head for place in range(len(results)) if place not in kept}
    if shared:
        made |= dict.fromkeys(kept, by_key_head)
    yield Alignment(members, made)


def _policy_attention(
    attrs: Attrs, operands: Kinds, results: Kinds, ranks: int
) -> Iterator[Alignment]:
    k = operands[KEY]
    assert k is not None
    if int(k.shape[1]) < ranks:
        return  # the pages of a key head are chosen by all query heads that read it
    state = range(SELECTED, len(operands))
    (dense,) = _attention(attrs, operands[:SELECTED], results[:3], ranks)
    members, made = dict(dense.operands), dict(dense.results)
    names = len(results) - 3
    for place in state[:names]:
        kind = operands[place]
        if kind is not None and len(kind.shape) > 2:  # others count steps, one a text
            members[place] = made[place - SELECTED + 3] = Split(1)
    yield Alignment(members, made)


def _experts(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    gates = operands[1]
    assert gates is not None
    count = int(gates.shape[-1])
    # A part of the neurons of every expert, so that no choice leaves a rank without work.
    rows = {
        place: Split(0, sections=count)
        for place in (2, 4, 5, 6)
        if place < len(operands) and operands[place] is not None
    }
    yield Alignment({**rows, 3: Split(1, sections=count)}, sums=(0,))


def _moe(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    (routed,) = _experts(attrs, operands, results, ranks)
    members = dict(routed.operands)
    for place, axis in ((7, 0), (8, 1), (9, 0), (10, 0), (11, 0)):
        if place < len(operands) and operands[place] is not None:
            members[place] = Split(axis)
    yield Alignment(members, sums=(0,))


def _transformed(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    mixes = any(kind is not None for kind in operands[2:]) or attrs.get("bits", 0)
    over_features = attrs.get("before", "") == "norm" or mixes
    for found in pointwise(operands, results[:1], fixed=int(bool(over_features)), places=(0, 1)):
        # Scales of codes have the axes of tokens and heads.
        yield Alignment(found.operands, dict.fromkeys(range(len(results)), found.results[0]))


def _each_entry(attrs: Attrs, operands: Kinds, results: Kinds, ranks: int) -> Iterator[Alignment]:
    yield from pointwise(operands, results)


_RULES = {
    "mean_square": _mean_square, "rms_norm_by": _norm_by,
    "rms_norm": _norm, "layer_norm": _norm, "quantise_dequantise": _norm,
    "kronecker": _kronecker, "linear": _linear, "embedding": _embedding,
    "vocab_parallel_embedding": _vocabulary, "rope": _rope, "split_heads": _split_heads,
    "merge_heads": _merge_heads, "transpose_heads": _transpose_heads, "attention": _attention,
    "policy_attention": _policy_attention, "experts": _experts, "moe": _moe,
    "add_rms_norm": _norm, "transformed": _transformed, "act_mul": _each_entry,
    "no_addend": _each_entry,
}  # fmt: skip

_BIASES = {"linear": 2, "moe": 12}
"""Operands that are added to a partial sum: on one rank alone."""


def adds(op: str, place: int) -> bool:
    """Return whether an operand is added to what may be a partial sum."""
    return _BIASES.get(op) == place


def pieces(node: Node, attrs: Attrs) -> list[Node]:
    """Return a node that does several things at once as one node for each; others as they are."""
    inputs, outputs = node.inputs, node.outputs
    if node.op == "rope_pair":
        tables = inputs[2:]
        return [
            Node("rope", [x, *tables], node.attrs, [y])
            for x, y in zip(inputs[:2], outputs, strict=True)
        ]
    if node.op in ("fused_linear", "packed_linear", "integer_linear"):
        first, parts = 2 if node.op == "integer_linear" else 1, attrs["parts"]
        factors = inputs[first:]
        return [
            Node("linear", [inputs[0], *factors[part::parts]], {}, [outputs[part]])
            for part in range(parts)
        ]
    return [node]


def keeps_sums(op: str, attrs: Attrs, operands: Kinds, summed: Collection[int]) -> bool:
    """Return whether a node is linear in some operands: of partial sums it makes one.

    Args:
        summed: Places of operands that are partial sums; the others are the same on every rank.
    """
    if is_aten(op):
        return aten_keeps_sums(op, attrs, operands, summed)
    present = [place for place, kind in enumerate(operands) if kind is not None]
    if op == "add":
        return len(summed) == len(present)
    if op == "mul":
        return len(summed) == 1
    if op == "embedding":
        return list(summed) == [1]
    return op in ("scale", "split_heads", "merge_heads", "transpose_heads")


def local_attrs(
    op: str, attrs: Attrs, operands: Kinds, results: Kinds, made: Mapping[int, Layout], ranks: int
) -> dict[str, Any]:
    """Return a node's attributes for a rank's parts.

    Args:
        attrs: As the node has them: for the whole.
        operands, results: Types of the whole values.
        made: How each result is split.
    """
    if not is_aten(op):
        return dict(attrs)
    return aten_local_attrs(op, attrs, operands, results, made, ranks)


def features_of_all(op: str, attrs: Attrs, copies: int) -> dict[str, Any] | None:
    """Return the attributes of a node whose sum counts parts that are on several ranks each.

    None where it has none that allow for that.
    """
    return {**attrs, "features": attrs["features"] * copies} if op == "mean_square" else None


def takes_any(op: str, place: int) -> bool:
    """Return whether a node reads nothing of an operand's values: it is how others should be."""
    return is_aten(op) and place == 0 and op.split(".")[1].startswith("new_")


def reason(node: Node) -> str:
    """Return why a node does not do with parts of what it reads, as a clause."""
    name = node.op.removeprefix("aten.").split(".")[0] if is_aten(node.op) else node.op
    return _REASONS.get(name, f"{name} ({node.outputs[0].name}) is not known to work on parts")


_REASONS = {
    "layer_norm": "a norm is taken over the features that would be split",
    "rms_norm": "a norm is taken over the features that would be split",
    "vocab_parallel_embedding": "a table of tokens is split by its rows",
    "kronecker": "a transform mixes the features that would be split",
    "quantise_dequantise": "activations are rounded over the features that would be split",
    "policy_attention": "a KV policy chooses pages by all query heads of a key head",
}
