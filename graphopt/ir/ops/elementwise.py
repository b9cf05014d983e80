"""Elementwise ops: activations, sums, products, constants."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.ops.base import (
    Attrs,
    Number,
    Op,
    Positive,
    Tensors,
    Types,
    broadcast,
    need,
    register,
)
from graphopt.ir.types import Dim, Type, dim


class Unary(Op):
    """y = f(x), elementwise."""

    operands = ("x",)
    cost = 4

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        return [need(types, 0)]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return dim(self.cost * outputs[0].numel)


def _unary(
    op_name: str,
    plain: Callable[[Tensor], Tensor],
    fast: Callable[[Tensor], Tensor],
    formula: str,
    flops: int = 4,
) -> None:
    """Register an activation without attributes."""

    class _Activation(Unary):
        name = op_name
        cost = flops

        def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
            x = tensors[0]
            assert x is not None
            return (plain(x),)

        def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
            x = tensors[0]
            assert x is not None
            return (fast(x),)

    _Activation.__doc__ = formula
    register(_Activation)


_unary("abs", lambda x: torch.where(x < 0, -x, x), torch.abs, "y = |x|", 1)
_unary("relu", lambda x: x.clamp(min=0), F.relu, "y = max(x, 0)", 1)
_unary("relu2", lambda x: x.clamp(min=0) ** 2, functional.relu2, "y = max(x, 0)^2", 2)
_unary("silu", lambda x: x / (1 + torch.exp(-x)), F.silu, "y = x sigmoid(x)")
_unary("sigmoid", lambda x: 1 / (1 + torch.exp(-x)), torch.sigmoid, "y = 1 / (1 + exp(-x))")
_unary("tanh", torch.tanh, torch.tanh, "y = tanh(x)")
_unary(
    "gelu",
    lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    F.gelu,
    "y = x Phi(x). Source: Hendrycks and Gimpel, arXiv 1606.08415.",
    6,
)
_unary(
    "gelu_tanh",
    lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    functional.gelu_tanh,
    "GELU by its tanh approximation. Source: Hendrycks and Gimpel, arXiv 1606.08415.",
    8,
)
_unary(
    "quick_gelu",
    lambda x: x / (1 + torch.exp(-1.702 * x)),
    functional.quick_gelu,
    "y = x sigmoid(1.702 x)",
)


@register
class Softcap(Unary):
    """y = cap tanh(x / cap). Source: Gemma 2, arXiv 2408.00118, section 2."""

    name = "softcap"
    attributes = {"cap": Positive}  # noqa: RUF012

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (torch.tanh(x / attrs["cap"]) * attrs["cap"],)


@register
class Scale(Unary):
    """y = factor x, with a plain number."""

    name = "scale"
    attributes = {"factor": Number}  # noqa: RUF012
    cost = 1

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x = tensors[0]
        assert x is not None
        return (x * attrs["factor"],)


class Binary(Op):
    """y = f(a, b), elementwise with broadcasting."""

    operands = ("a", "b")

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        a, b = need(types, 0), need(types, 1)
        return [Type(broadcast(a.shape, b.shape), torch.promote_types(a.dtype, b.dtype))]


@register
class Add(Binary):
    """y = a + b."""

    name = "add"

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        a, b = tensors
        assert a is not None and b is not None
        return (a + b,)


@register
class Mul(Binary):
    """y = a b."""

    name = "mul"

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        a, b = tensors
        assert a is not None and b is not None
        return (a * b,)
