"""Norms over the last dimension."""

from __future__ import annotations

from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.ops.base import (
    Attrs,
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
