"""Matrix products."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.ops.base import Attrs, Op, Tensors, Types, need, optional, register, same
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
        return (functional.linear(x, weight, bias),)


@register
class Kronecker(Op):
    """y = x (left kron right): x [..., n1 n2], left [n1, n1], right [n2, n2] -> [..., n1 n2].

    A row is read as a matrix X [n1, n2], and y is left^T X right. An absent factor is the identity:
    `left` alone mixes heads that lie side by side, feature by feature, and `right` alone the
    features of each head, or of all where it is as wide as x. The inverse transform, in the weight
    that reads y, is W (left^-T kron right^-T).

    Source: Sun et al., FlatQuant, arXiv 2410.09426, section 3.1.
    """

    name = "kronecker"
    operands = ("x", "left?", "right?")

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        x, sides = need(types, 0), self._sides(types)
        width = x.shape[-1] if x.shape else 0
        if not sides:
            raise ValueError(f"kronecker of {x} with neither a left nor a right factor")
        for factor in (kind for kind in types[1:] if kind is not None):
            rows = factor.shape[0] if factor.shape else 0
            if len(factor.shape) != 2 or not same(rows, factor.shape[1]):
                raise ValueError(f"kronecker with factor {factor}, which is not square")
        size = sympy.prod(sides.values())
        fits = same(width, size) if len(sides) == 2 else sympy.sympify(width) % size == 0
        if not fits:
            named = " and ".join(f"{name} factor of {n}" for name, n in sides.items())
            raise ValueError(f"kronecker of {x} with a {named}, whose sizes do not make its width")
        return [x]

    @staticmethod
    def _sides(types: Types) -> dict[str, Dim]:
        """Return the size of each factor that there is, by its name."""
        return {
            name: kind.shape[0] if kind.shape else 0
            for name, kind in zip(("left", "right"), types[1:], strict=False)
            if kind is not None
        }

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(2 * outputs[0].numel * sum(self._sides(types).values()))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, left, right = tensors[0], optional(tensors, 1), optional(tensors, 2)
        assert x is not None
        sides = [None if factor is None else factor.shape[0] for factor in (left, right)]
        rest = x.shape[-1] // (sides[0] or sides[1] or 1)
        if left is None:
            left = torch.eye(rest, dtype=x.dtype, device=x.device)
        if right is None:
            right = torch.eye(rest, dtype=x.dtype, device=x.device)
        return (x @ torch.kron(left, right),)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (functional.kronecker(x, optional(tensors, 1), optional(tensors, 2)),)
