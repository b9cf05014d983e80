"""Scaled dot-product attention, and the moves of heads around it."""

from __future__ import annotations

from typing import Any, ClassVar

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
    need,
    register,
    same,
)
from graphopt.ir.types import Dim, P, Type, dim

QUERY, KEY, VALUE, MASK, BIAS, SLOPES, SINKS, PAST_K, PAST_V = range(9)


def _get(items: Tensors, index: int) -> Tensor | None:
    return items[index] if index < len(items) else None


def _alike(a: Type, b: Type, axes: tuple[int, ...]) -> bool:
    """True where two types of rank 4 agree along `axes`."""
    return len(a.shape) == len(b.shape) == 4 and all(same(a.shape[i], b.shape[i]) for i in axes)


@register
class Attention(Op):
    """softmax(cap(q k^T scale) + alibi + bias, over allowed keys) v; rows with no key give 0.

    Operands: q [B,H,S,D]; k [B,G,S,D]; v [B,G,S,Dv]; mask [B,T] nonzero at real tokens;
    bias additive, broadcastable to [B,H,S,T]; slopes [H] (ALiBi by key position);
    sinks [H]; past_k [B,G,P,D], past_v [B,G,P,Dv].
    Without past T = S, and the one output is o [B,H,S,Dv]. With past the new keys and values
    are put behind it, T = P + S, and present_k, present_v are outputs two and three.
    Query i stands at cache index P + i: `causal` allows keys up to it, `window` the last
    `window` of those, `chunk` those in its own chunk of that length.
    With `ring` the past holds the last min(P, ring) tokens alone, and so do the present keys and
    values those of P + S; the mask still has a column for each of the P + S tokens. That gives the
    same output where a window is no longer than the ring, and nothing depends on the number of
    the tokens that are gone.
    Further outputs, last: with `lse` the log-sum-exp of each row's scores [B,H,S], sinks included;
    with `page_max` the largest score among each `page_max` neighbouring keys, [B,H,S,pages]. Both
    are -inf where nothing is seen.
    """

    name = "attention"
    operands = ("q", "k", "v", "mask?", "bias?", "slopes?", "sinks?", "past_k?", "past_v?")
    attributes = {  # noqa: RUF012
        "scale": Number, "causal": bool, "window": Count | None, "chunk": Count | None,
        "softcap": Positive | None, "ring": Count | None,
        "lse": bool, "page_max": Count | None,
    }  # fmt: skip
    defaults: ClassVar[Attrs] = {
        "window": None, "chunk": None, "softcap": None, "ring": None,
        "lse": False, "page_max": None,
    }  # fmt: skip

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        q, k, v = need(types, 0), need(types, 1), need(types, 2)
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
        if ring is not None:
            _check_ring(ring, past, attrs)
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
            statistics.append(Type((*rows, pages), torch.float32))
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
        # The full S x T rectangle: what a kernel that skips nothing computes.
        q, k, v = need(types, 0), need(types, 1), need(types, 2)
        past = types[PAST_K] if len(types) > PAST_K else None
        keys = k.shape[2] if past is None else past.shape[2] + k.shape[2]
        rows = q.shape[0] * q.shape[1] * q.shape[2]
        return dim(rows * keys * (2 * q.shape[3] + 2 * v.shape[3] + 5))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        q, k, v = tensors[0], tensors[1], tensors[2]
        assert q is not None and k is not None and v is not None
        past_k, past_v = _get(tensors, PAST_K), _get(tensors, PAST_V)
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
            found.append(torch.stack([page.amax(-1) for page in pages], -1))
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
        if asks_for_statistics(attrs):
            options |= {key: attrs.get(key) for key in ("ring", "page_max")}
            options["lse"] = bool(attrs.get("lse"))
            return functional.attention_results(
                q, k, v, past, *extras, cached=past is not None, **options
            )
        if past is None:
            return (functional.attention(q, k, v, *extras, **options),)
        options["ring"] = attrs.get("ring")
        return functional.cached_attention(q, k, v, past, *extras, **options)


def _check_ring(ring: int, past: Type | None, attrs: Attrs) -> None:
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
    if attrs.get("chunk") is not None:
        raise ValueError("attention: chunks begin at positions that a ring does not keep")


def asks_for_statistics(attrs: Attrs) -> bool:
    """Return whether an attention has results beside its output, keys and values."""
    return bool(attrs.get("lse")) or attrs.get("page_max") is not None


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
