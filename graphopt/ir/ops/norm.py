"""Norms over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.ops.base import (
    Attrs,
    Count,
    Least,
    Number,
    Op,
    Tensors,
    Types,
    broadcast,
    need,
    optional,
    register,
)
from graphopt.ir.types import Dim, Type, dim


def _infer(types: Types) -> list[Type]:
    x = need(types, 0)
    for gain in types[1:]:
        if gain is not None and broadcast(x.shape, gain.shape) != x.shape:
            raise ValueError(f"norm of {x} with gain {gain}")
    return [x]


@register
class RmsNorm(Op):
    """y = x / sqrt(mean(x^2) + eps) * (weight + offset).

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4; the offset is Gemma's.
    """

    name = "rms_norm"
    operands = ("x", "weight?")
    attributes = {"eps": Least, "offset": Number}  # noqa: RUF012
    defaults = {"offset": 0.0}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        return _infer(types)

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(4 * outputs[0].numel)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, weight = tensors[0], optional(tensors, 1)
        assert x is not None
        y = x / (x.pow(2).mean(-1, keepdim=True) + attrs["eps"]).sqrt()
        return (y if weight is None else y * (weight + attrs.get("offset", 0.0)),)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        weight = optional(tensors, 1)
        return (functional.rms_norm(x, weight, attrs["eps"], attrs.get("offset", 0.0)),)


@register
class MeanSquare(Op):
    """sum(x^2) / features over the last axis, [..., 1] in fp32 at least.

    With `rms_norm_by` the two halves of a norm over features of which a rank has a part: its
    `features` are those of all ranks, so that the ranks' results add up to the mean.
    """

    name = "mean_square"
    operands = ("x",)
    attributes = {"features": Count}  # noqa: RUF012
    fused = True  # only the emitters that write for several devices need a translation

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x = need(types, 0)
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        return [Type((*x.shape[:-1], 1), wide)]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(2 * need(types, 0).numel)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return ((x**2).sum(-1, keepdim=True) / attrs["features"],)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (functional.mean_square(x, attrs["features"]),)


@register
class RmsNormBy(Op):
    """y = x / sqrt(mean_square + eps) * (weight + offset), mean_square [..., 1]; see `rms_norm`."""

    name = "rms_norm_by"
    operands = ("x", "mean_square", "weight?")
    attributes = RmsNorm.attributes
    defaults = RmsNorm.defaults
    fused = True

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x, mean = need(types, 0), need(types, 1)
        if mean.shape != (*x.shape[:-1], 1):
            raise ValueError(f"rms_norm_by of {x} with a mean square {mean}")
        return _infer([x, *types[2:]])

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(2 * outputs[0].numel)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, mean, weight = tensors[0], tensors[1], optional(tensors, 2)
        assert x is not None and mean is not None
        y = x / (mean + attrs["eps"]).sqrt()
        return (y if weight is None else y * (weight + attrs.get("offset", 0.0)),)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, mean = tensors[0], tensors[1]
        assert x is not None and mean is not None
        numbers = attrs["eps"], attrs.get("offset", 0.0)
        return (functional.rms_norm_by(x, mean, optional(tensors, 2), *numbers),)


@register
class LayerNorm(Op):
    """y = (x - mean) / sqrt(var + eps) * weight + bias. Source: Ba et al., arXiv 1607.06450."""

    name = "layer_norm"
    operands = ("x", "weight?", "bias?")
    attributes = {"eps": Least}  # noqa: RUF012

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        return _infer(types)

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(7 * outputs[0].numel)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, weight, bias = tensors[0], optional(tensors, 1), optional(tensors, 2)
        assert x is not None
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.pow(2).mean(-1, keepdim=True) + attrs["eps"]).sqrt()
        y = y if weight is None else y * weight
        return (y if bias is None else y + bias,)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (functional.layer_norm(x, optional(tensors, 1), optional(tensors, 2), attrs["eps"]),)
