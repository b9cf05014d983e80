"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.ops.base import Attrs, Op, Tensors, Types, need, register, same
from graphopt.ir.types import Dim, Type, dim
from graphopt.runtime import ops as runtime


@register
class RopeTable(Op):
    """Cosines and sines: positions [B, S], inv_freq [R/2] -> two of [B, S, R/2].

    Source: Su et al., arXiv 2104.09864, section 3.2.2.
    """

    name = "rope_table"
    operands = ("positions", "inv_freq")
    defaults = {"scale": 1.0}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        positions, inv_freq = need(types, 0), need(types, 1)
        if len(inv_freq.shape) != 1:
            raise ValueError(f"rope_table with inv_freq {inv_freq}")
        table = Type((*positions.shape, inv_freq.shape[0]), inv_freq.dtype)
        return [table, table]

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        positions, inv_freq = tensors
        assert positions is not None and inv_freq is not None
        angles = positions.to(inv_freq.dtype).unsqueeze(-1) * inv_freq
        scale = attrs.get("scale", 1.0)
        return torch.cos(angles) * scale, torch.sin(angles) * scale

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        positions, inv_freq = tensors
        assert positions is not None and inv_freq is not None
        return runtime.rope_table(positions, inv_freq, attrs.get("scale", 1.0))


@register
class Rope(Op):
    """Rotate the first R features of every head; cos, sin [B, S, R/2].

    x is [B, H, S, D], or [B, S, H, D] with `heads_first=False`. Pairs are halves, or
    neighbours with `interleaved=True`.
    """

    name = "rope"
    operands = ("x", "cos", "sin")
    defaults = {"interleaved": False, "heads_first": True}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x, cos, sin = need(types, 0), need(types, 1), need(types, 2)
        fits = len(x.shape) == 4 and len(cos.shape) == 3 and cos.shape == sin.shape
        width, half = x.shape[-1], cos.shape[-1]
        if not fits or not isinstance(width, int) or 2 * int(half) > width:
            raise ValueError(f"rope of {x} with tables {cos} and {sin}")
        tokens = (x.shape[0], x.shape[2 if attrs.get("heads_first", True) else 1])
        if not all(a in (1, b) or same(a, b) for a, b in zip(cos.shape, tokens, strict=False)):
            raise ValueError(f"rope of {x} with tables {cos} and {sin}")
        return [x]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        x, cos = need(types, 0), need(types, 1)
        return dim(3 * x.numel / x.shape[-1] * 2 * cos.shape[-1])

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, cos, sin = tensors
        assert x is not None and cos is not None and sin is not None
        axis = 1 if attrs.get("heads_first", True) else 2
        cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)
        half = cos.shape[-1]
        out = x.clone()
        for pair in range(half):
            first, second = (
                (2 * pair, 2 * pair + 1) if attrs.get("interleaved") else (pair, pair + half)
            )
            c, s = cos[..., pair], sin[..., pair]
            out[..., first] = x[..., first] * c - x[..., second] * s
            out[..., second] = x[..., second] * c + x[..., first] * s
        return (out,)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, cos, sin = tensors
        assert x is not None and cos is not None and sin is not None
        interleaved, first = attrs.get("interleaved", False), attrs.get("heads_first", True)
        return (runtime.rope(x, cos, sin, interleaved, first),)
