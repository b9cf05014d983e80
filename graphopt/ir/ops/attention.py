"""Scaled dot-product attention, and the moves of heads around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import sympy
import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.ops.base import (
    Attrs,
    Count,
    Number,
    Op,
    Positive,
    Tensors,
    Types,
    broadcast,
    get_op,
    need,
    register,
    same,
)
from graphopt.ir.types import Dim, P, Type, dim
from graphopt.ir.windowed_attention import attention_in_blocks, runs_in_blocks

QUERY, KEY, VALUE, MASK, BIAS, SLOPES, SINKS, PAST_K, PAST_V, SELECTED = range(10)


def _get(items: Tensors, index: int) -> Tensor | None:
    return items[index] if index < len(items) else None


def _at(types: Types, index: int) -> Type | None:
    return types[index] if index < len(types) else None


def _alike(a: Type, b: Type, axes: tuple[int, ...]) -> bool:
    """True where two types of rank 4 agree along `axes`."""
    return len(a.shape) == len(b.shape) == 4 and all(same(a.shape[i], b.shape[i]) for i in axes)


ATTENTIONS = frozenset({"attention", "policy_attention"})
"""The ops in which tokens read earlier ones."""

KVBits = Literal[4, 8, 16]
"""Type of the bits that keys and values are rounded to; 16 for not at all."""


@register
class Attention(Op):
    """softmax(cap(q k^T scale) + alibi + bias, over allowed keys) v; rows with no key give 0.

    Operands: q [B,H,S,D]; k [B,G,S,D]; v [B,G,S,Dv]; mask [B,T] nonzero at real tokens;
    bias additive, broadcastable to [B,H,S,T]; slopes [H] (ALiBi by key position);
    sinks [H]; past_k [B,G,P,D], past_v [B,G,P,Dv]; selected_blocks int [B,G,M], or 1 in place of
    B or G.
    Without past T = S, and the one output is o [B,H,S,Dv]. With past the new keys and values
    are put behind it, T = P + S, and present_k, present_v are outputs two and three.
    Query i stands at cache index P + i: `causal` allows keys up to it, `window` the last
    `window` of those, `chunk` those in its own chunk of that length.
    With `ring` the past holds the last min(P, ring) tokens alone, and so do the present keys and
    values those of P + S; the mask still has a column for each of the P + S tokens. That gives the
    same output where a window is no longer than the ring, and nothing depends on the number of
    the tokens that are gone.
    With `selected_blocks` a key is seen only if its page is listed: pages are `page` neighbouring
    keys, numbered from the first on. A number is listed at most once, in any order; a negative one
    names no page, and one behind the last key a page without keys.
    Further outputs, last: with `lse` the log-sum-exp of each row's scores [B,H,S], sinks included;
    with `page_max` the largest score among each `page_max` neighbouring keys, [B,H,S,pages], or in
    each page that is listed, [B,H,S,M]. Both are -inf where nothing is seen.
    With `kv_bits` below 16 new keys and values are rounded first, as `quantise_dequantise` does
    with zero points; lowering makes such attentions, with a past, for caches of codes.
    """

    name = "attention"
    operands = (
        "q", "k", "v", "mask?", "bias?", "slopes?", "sinks?", "past_k?", "past_v?",
        "selected_blocks?",
    )  # fmt: skip
    attributes = {  # noqa: RUF012
        "scale": Number, "causal": bool, "window": Count | None, "chunk": Count | None,
        "softcap": Positive | None, "ring": Count | None,
        "lse": bool, "page_max": Count | None, "page": Count | None, "kv_bits": KVBits,
    }  # fmt: skip
    defaults: ClassVar[Attrs] = {
        "window": None, "chunk": None, "softcap": None, "ring": None,
        "lse": False, "page_max": None, "page": None, "kv_bits": 16,
    }  # fmt: skip

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        q, k, v = need(types, 0), need(types, 1), need(types, 2)
        if attrs.get("kv_bits", 16) < 16 and (
            _at(types, PAST_K) is None or is_general(attrs, types)
        ):
            raise ValueError("attention: only keys and values of a cache are rounded by it")
        if not (len(q.shape) == len(k.shape) == len(v.shape) == 4):
            raise ValueError(f"attention of {q}, {k}, {v}")
        if not same(q.shape[3], k.shape[3]) or not same(k.shape[1], v.shape[1]):
            raise ValueError(f"attention of {q}, {k}, {v}: head sizes or counts differ")
        if not (same(q.shape[0], k.shape[0]) and _alike(k, v, axes=(0, 2))):
            raise ValueError(f"attention of {q}, {k}, {v}: batches or lengths differ")
        if int(q.shape[1]) % int(k.shape[1]):
            raise ValueError(f"attention: {q.shape[1]} query heads over {k.shape[1]} key heads")
        past = types[PAST_K] if len(types) > PAST_K else None
        past_v = types[PAST_V] if len(types) > PAST_V else None
        if (past is None) != (past_v is None):
            raise ValueError("attention: past keys and past values come together or not at all")
        if past is not None and past_v is not None:
            alike = _alike(past, k, axes=(0, 1, 3)) and _alike(past_v, v, axes=(0, 1, 3))
            if not alike or not same(past.shape[2], past_v.shape[2]):
                raise ValueError(f"attention of {k}, {v} with past {past}, {past_v}")
        keys = k.shape[2] if past is None else past.shape[2] + k.shape[2]
        ring = attrs.get("ring")
        slopes = types[SLOPES] if len(types) > SLOPES else None
        selected = types[SELECTED] if len(types) > SELECTED else None
        if ring is not None:
            _check_ring(ring, past, attrs, alibi=slopes is not None)
        _check_selected(selected, k, attrs)
        mask = types[MASK] if len(types) > MASK else None
        tokens = keys if ring is None else P + k.shape[2]
        if mask is not None and (len(mask.shape) != 2 or not same(mask.shape[1], tokens)):
            raise ValueError(f"attention: mask {mask} for {tokens} keys")
        bias = types[BIAS] if len(types) > BIAS else None
        if bias is not None:
            broadcast(bias.shape, (q.shape[0], q.shape[1], q.shape[2], keys))
        for index in (SLOPES, SINKS):
            per_head = types[index] if len(types) > index else None
            if per_head is not None and per_head.shape != (q.shape[1],):
                raise ValueError(f"attention: {self.operands[index]} {per_head} for {q}")
        out = Type((*q.shape[:3], v.shape[3]), q.dtype)
        rows = tuple(q.shape[:3])
        statistics = [Type(rows, torch.float32)] if attrs.get("lse") else []
        if attrs.get("page_max") is not None:
            pages = dim(sympy.ceiling(sympy.sympify(keys) / attrs["page_max"]))
            listed = pages if selected is None else selected.shape[2]
            statistics.append(Type((*rows, listed), torch.float32))
        if past is None:
            return [out, *statistics]
        kept = dim(keys) if ring is None else sympy.Min(tokens, ring)
        return [
            out,
            Type((k.shape[0], k.shape[1], kept, k.shape[3]), k.dtype),
            Type((v.shape[0], v.shape[1], kept, v.shape[3]), v.dtype),
            *statistics,
        ]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        # The full S x T rectangle, or that of the listed pages: what a kernel computes that skips
        # nothing else.
        q, v = need(types, 0), need(types, 2)
        rows = q.shape[0] * q.shape[1] * q.shape[2]
        return dim(rows * _keys_read(types, attrs) * (2 * q.shape[3] + 2 * v.shape[3] + 5))

    def bytes(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        moved = sympy.sympify(super().bytes(types, outputs, attrs))
        if len(types) <= SELECTED or types[SELECTED] is None:
            return dim(moved)
        # Of the keys and values those in listed pages are read, and the new ones written: a state
        # is extended where it lies.
        k, v = need(types, KEY), need(types, VALUE)
        head = sympy.sympify(k.shape[3] * k.dtype.itemsize + v.shape[3] * v.dtype.itemsize)
        tokens = k.shape[0] * k.shape[1] * head
        past = types[PAST_K]
        before = 0 if past is None else past.shape[2]
        moved -= tokens * (before + k.shape[2]) * (1 if past is None else 2)
        return dim(
            moved + tokens * (_keys_read(types, attrs) + (0 if past is None else k.shape[2]))
        )

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        q, k, v = tensors[0], tensors[1], tensors[2]
        assert q is not None and k is not None and v is not None
        past_k, past_v = _get(tensors, PAST_K), _get(tensors, PAST_V)
        if attrs.get("kv_bits", 16) < 16:
            rounding = {"bits": attrs["kv_bits"], "symmetric": False}
            k, v = (get_op("quantise_dequantise").reference([x], rounding)[0] for x in (k, v))
        if past_k is not None and past_v is not None:
            k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
        batch, heads, queries, _ = q.shape
        keys, groups = k.shape[2], q.shape[1] // k.shape[1]
        k_full, v_full = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k_full.transpose(-1, -2) * attrs["scale"]
        if attrs.get("softcap") is not None:
            scores = torch.tanh(scores / attrs["softcap"]) * attrs["softcap"]
        mask, bias = _get(tensors, MASK), _get(tensors, BIAS)
        slopes, sinks = _get(tensors, SLOPES), _get(tensors, SINKS)
        ring = attrs.get("ring")
        if mask is not None and ring is not None:
            mask = mask[:, mask.shape[1] - keys :]
        if mask is None:
            mask = torch.ones(batch, keys, dtype=torch.long, device=q.device)
        if slopes is not None:
            position = (mask.cumsum(-1) - 1) * mask
            scores = scores + slopes.view(1, -1, 1, 1) * position.view(batch, 1, 1, keys)
        if bias is not None:
            scores = scores + bias
        query_index = torch.arange(queries, device=q.device).view(-1, 1) + keys - queries
        key_index = torch.arange(keys, device=q.device).view(1, -1)
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        if attrs["causal"]:
            allowed &= key_index <= query_index
        if attrs.get("window") is not None:
            allowed &= key_index > query_index - attrs["window"]
        if attrs.get("chunk") is not None:
            allowed &= key_index // attrs["chunk"] == query_index // attrs["chunk"]
        allowed = allowed & mask.bool().view(batch, 1, 1, keys)
        selected = _get(tensors, SELECTED)
        if selected is not None:
            listed = (key_index // (attrs.get("page") or 1) == selected[..., None]).any(-2)
            listed = listed.expand(batch, k.shape[1], keys)
            allowed = allowed & listed.repeat_interleave(groups, 1)[:, :, None]
        scores = scores.masked_fill(~allowed, float("-inf"))
        empty = (scores == float("-inf")).all(-1, keepdim=True)
        if sinks is not None:
            column = sinks.view(1, heads, 1, 1).expand(batch, heads, queries, 1)
            scores = torch.cat((scores, column.to(scores.dtype)), -1)
        weights = torch.softmax(scores, -1)[..., :keys]
        out = (weights @ v_full).masked_fill(empty, 0.0)
        found = [out]
        if past_k is not None:
            gone = 0 if ring is None else max(keys - ring, 0)
            found += [k[:, :, gone:], v[:, :, gone:]]
        if attrs.get("lse"):
            found.append(torch.logsumexp(scores, -1))
        if attrs.get("page_max") is not None:
            pages = scores[..., :keys].split(attrs["page_max"], -1)
            maxima = torch.stack([page.amax(-1) for page in pages], -1)
            found.append(maxima if selected is None else _of_listed(maxima, selected, groups))
        return tuple(found)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        q, k, v = tensors[0], tensors[1], tensors[2]
        assert q is not None and k is not None and v is not None
        past_k, past_v = _get(tensors, PAST_K), _get(tensors, PAST_V)
        extras = [_get(tensors, index) for index in (MASK, BIAS, SLOPES, SINKS)]
        options: dict[str, Any] = {
            key: attrs.get(key) for key in ("scale", "causal", "window", "chunk", "softcap")
        }
        past = None if past_k is None or past_v is None else (past_k, past_v)
        if past is None and not is_general(attrs, tensors):
            window, others = attrs.get("window"), (*extras, options["chunk"], options["softcap"])
            alone = attrs["causal"] and all(other is None for other in others)
            if alone and window is not None and runs_in_blocks(q, k, window):
                return (attention_in_blocks(q, k, v, window=window, scale=attrs["scale"]),)
            return (functional.attention(q, k, v, *extras, **options),)
        options["ring"] = attrs.get("ring")
        if not is_general(attrs, tensors):
            if attrs.get("kv_bits", 16) < 16:
                rounding = {"bits": attrs["kv_bits"], "symmetric": False}
                k, v = (functional.quantise_dequantise(x, **rounding) for x in (k, v))
            out, present = functional.cached_attention(q, k, v, past, *extras, **options)
            return out, *present
        options |= {key: attrs.get(key) for key in ("page_max", "page")}
        out, *results = functional.attention_results(
            q, k, v, past, *extras,
            cached=past is not None, lse=bool(attrs.get("lse")),
            selected_blocks=_get(tensors, SELECTED), **options,
        )  # fmt: skip
        return (out, *results) if past is None else (out, *results[0], *results[1:])


def _keys_read(types: Types, attrs: Attrs) -> sympy.Expr:
    """Return how many keys a query is multiplied with at most."""
    past = types[PAST_K] if len(types) > PAST_K else None
    new = sympy.sympify(need(types, KEY).shape[2])
    keys = new if past is None else past.shape[2] + new
    selected = types[SELECTED] if len(types) > SELECTED else None
    if selected is None:
        return keys
    return sympy.Min(keys, selected.shape[2] * sympy.Integer(attrs["page"]))


def _of_listed(maxima: Tensor, selected: Tensor, groups: int) -> Tensor:
    """Return the maxima [B,H,S,M] of the pages that are listed, out of those of all pages."""
    batch, heads, queries, pages = maxima.shape
    listed = selected.expand(batch, heads // groups, -1).repeat_interleave(groups, 1)
    found = maxima.new_full((batch, heads, queries, listed.shape[2]), float("-inf"))
    for page in range(pages):
        here = (listed == page)[:, :, None].expand_as(found)
        found = torch.where(here, maxima[..., page : page + 1], found)
    return found


def _check_selected(selected: Type | None, k: Type, attrs: Attrs) -> None:
    """Refuse a list of pages that is none, or pages without a size.

    Raises:
        ValueError: With the reason.
    """
    page = attrs.get("page")
    if (selected is None) != (page is None):
        raise ValueError("attention: selected_blocks and the attribute page come together")
    if selected is None:
        return
    rows = (k.shape[0], k.shape[1])
    fits = len(selected.shape) == 3 and all(
        size == 1 or same(size, row) for size, row in zip(selected.shape, rows, strict=False)
    )
    if not fits or selected.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"attention: selected_blocks are {selected}: give whole numbers [B, {k.shape[1]}, M]"
        )
    if attrs.get("page_max") not in (None, page):
        raise ValueError(
            f"attention: maxima of pages of {attrs['page_max']} keys, selected by pages of {page}"
        )


def _check_ring(ring: int, past: Type | None, attrs: Attrs, *, alibi: bool) -> None:
    """Refuse a ring that does not hold all that an attention reads.

    Raises:
        ValueError: With the reason.
    """
    window = attrs.get("window")
    if past is None or not same(past.shape[2], sympy.Min(P, ring)):
        raise ValueError(f"attention: a ring of {ring} keys with the past {past}")
    if window is None or window > ring:
        seen = "all keys" if window is None else f"the last {window}"
        raise ValueError(f"attention: a query sees {seen}, and a ring of {ring} does not hold them")
    for name, what in (("chunk", "chunks"), ("page", "pages"), ("page_max", "pages")):
        if attrs.get(name) is not None:
            raise ValueError(f"attention: {what} begin at positions that a ring does not keep")
    if alibi and attrs.get("lse"):
        raise ValueError(
            "attention: a ring does not keep the positions that ALiBi adds to the log-sum-exp"
        )


def is_general(attrs: Attrs, operands: Sequence[object | None]) -> bool:
    """Return whether an attention reads selected pages, or has results beside the usual ones.

    Those are its output, keys and values.
    """
    selects = len(operands) > SELECTED and operands[SELECTED] is not None
    return selects or bool(attrs.get("lse")) or attrs.get("page_max") is not None


class _Move(Op):
    """Reorders elements; costs no arithmetic."""

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return 0


@register
class SplitHeads(_Move):
    """[B, S, H * head_dim] -> [B, H, S, head_dim]; without swap [B, S, H, head_dim]."""

    name = "split_heads"
    operands = ("x",)
    attributes = {"head_dim": Count, "swap": bool}  # noqa: RUF012
    defaults = {"swap": True}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x, head_dim = need(types, 0), attrs["head_dim"]
        width = x.shape[-1]
        fits = isinstance(width, int) and head_dim > 0 and width % head_dim == 0
        if len(x.shape) != 3 or not fits:
            raise ValueError(f"split_heads of {x} by {head_dim}")
        heads = int(width) // head_dim
        batch, sequence = x.shape[0], x.shape[1]
        if attrs.get("swap", True):
            return [Type((batch, heads, sequence, head_dim), x.dtype)]
        return [Type((batch, sequence, heads, head_dim), x.dtype)]

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        y = x.reshape(x.shape[0], x.shape[1], -1, attrs["head_dim"])
        return (y.transpose(1, 2) if attrs.get("swap", True) else y,)


@register
class MergeHeads(_Move):
    """[B, H, S, D] -> [B, S, H * D]; without swap from [B, S, H, D]."""

    name = "merge_heads"
    operands = ("x",)
    attributes = {"swap": bool}  # noqa: RUF012
    defaults = {"swap": True}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x = need(types, 0)
        if len(x.shape) != 4:
            raise ValueError(f"merge_heads of {x}")
        batch, first, second, head_dim = x.shape
        heads, sequence = (first, second) if attrs.get("swap", True) else (second, first)
        return [Type((batch, sequence, dim(heads * head_dim)), x.dtype)]

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        y = x.transpose(1, 2) if attrs.get("swap", True) else x
        return (y.flatten(2),)


@register
class TransposeHeads(_Move):
    """[B, S, H, D] <-> [B, H, S, D]."""

    name = "transpose_heads"
    operands = ("x",)

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x = need(types, 0)
        if len(x.shape) != 4:
            raise ValueError(f"transpose_heads of {x}")
        return [Type((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype)]

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (x.transpose(1, 2),)
