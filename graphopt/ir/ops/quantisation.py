"""Rounding of activations to few bits, given back as the values that the codes stand for."""

from __future__ import annotations

from typing import Annotated

import pydantic
import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.ops.base import Attrs, Op, Tensors, Types, broadcast, need, optional, register
from graphopt.ir.types import Dim, Type, dim

Bits = Annotated[int, pydantic.Field(ge=2, le=8)]
"""Type of the width of a code."""


@register
class QuantiseDequantise(Op):
    """Round each token of x [..., N] to 2^bits values, spaced evenly, and return those values.

    The last axis is a token's, or a token's of one head in [B, H, S, D]. With low = clip_low
    min(x, 0) and high = clip_high max(x, 0) over it, each clip 1 where absent:

    * symmetric: scale = max(high, -low) / (2^(bits-1) - 1), zero = 0, and codes go from
      -2^(bits-1) to 2^(bits-1) - 1;
    * else scale = (high - low) / (2^bits - 1), zero = round(-low / scale), and codes go from 0 to
      2^bits - 1.

    y = (clamp(round(x / scale) + zero) - zero) scale, halves rounded to even. A token of zeros
    gives zeros; one with a NaN or an infinity gives NaN throughout, so that neither becomes a code.
    A clip broadcasts against [..., 1].

    With `straight_through` a rounding has the gradient of the identity in the fast form (Bengio et
    al., arXiv 1308.3432); it changes no value.
    """

    name = "quantise_dequantise"
    operands = ("x", "clip_low?", "clip_high?")
    attributes = {"bits": Bits, "symmetric": bool, "straight_through": bool}  # noqa: RUF012
    defaults = {"straight_through": False}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x = need(types, 0)
        if not x.shape or not x.dtype.is_floating_point:
            raise ValueError(f"quantise_dequantise of {x}")
        token = (*x.shape[:-1], 1)
        for clip in types[1:]:
            if clip is not None and broadcast(token, clip.shape) != token:
                raise ValueError(f"quantise_dequantise of {x} with a clip {clip}")
        return [x]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        # A maximum, a division, a rounding, a clamp and a product; a minimum, and the zero twice.
        return dim((5 if attrs["symmetric"] else 8) * outputs[0].numel)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, clip_low, clip_high = tensors[0], optional(tensors, 1), optional(tensors, 2)
        assert x is not None
        low = x.amin(-1, keepdim=True).clamp(max=0) * (1 if clip_low is None else clip_low)
        high = x.amax(-1, keepdim=True).clamp(min=0) * (1 if clip_high is None else clip_high)
        count = 2 ** attrs["bits"]
        if attrs["symmetric"]:
            first, scale = -count // 2, torch.maximum(high, -low) / (count // 2 - 1)
        else:
            first, scale = 0, (high - low) / (count - 1)
        scale = torch.where(scale == 0, 1.0, scale)
        zero = torch.zeros_like(scale) if attrs["symmetric"] else (-low / scale).round()
        codes = ((x / scale).round() + zero).clamp(first, first + count - 1)
        return ((codes - zero) * scale,)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        clips = optional(tensors, 1), optional(tensors, 2)
        return (functional.quantise_dequantise(x, *clips, **attrs),)
