"""Matrix products."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.ops.base import Attrs, Op, Tensors, Types, need, register, same
from graphopt.ir.types import Dim, Type, dim


@register
class Linear(Op):
    """y = x weight^T + bias: x [..., in], weight [out, in], bias [out] -> [..., out]."""

    name = "linear"
    operands = ("x", "weight", "bias?")
    encoded = ("weight",)

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x, weight = need(types, 0), need(types, 1)
        if len(weight.shape) != 2 or not same(x.shape[-1], weight.shape[1]):
            raise ValueError(f"linear of {x} with weight {weight}")
        bias = types[2] if len(types) > 2 else None
        if bias is not None and bias.shape != (weight.shape[0],):
            raise ValueError(f"linear with weight {weight} and bias {bias}")
        return [Type((*x.shape[:-1], weight.shape[0]), x.dtype)]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(2 * outputs[0].numel * need(types, 0).shape[-1])

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, weight, bias = tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None
        assert x is not None and weight is not None
        y = x @ weight.transpose(0, 1)
        return (y if bias is None else y + bias,)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, weight, bias = tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None
        assert x is not None and weight is not None
        return (F.linear(x, weight, bias),)
