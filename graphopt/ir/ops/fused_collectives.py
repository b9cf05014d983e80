"""What a kernel does at once of a computation and of the collective behind it.

As with other fused ops, lowering alone makes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graphopt.ir import collectives
from graphopt.ir.ops.base import Attrs, Op, Tensors, Types, get_op, register
from graphopt.ir.ops.collectives import Ranks
from graphopt.ir.types import Dim, Type, dim


@register
class LinearAllReduce(Op):
    """The sum over the ranks of x weight^T + bias: `linear`, and `all_reduce` of what it makes.

    Each rank has a part of the features x [..., in] and of the weight [out, in]; a bias adds up.
    """

    name = "linear_all_reduce"
    operands = ("x", "weight", "bias?")
    attributes = {"ranks": Ranks}  # noqa: RUF012
    fused = True

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        return get_op("all_reduce").infer(get_op("linear").infer(types, {}), attrs)

    def flops(self, types: Types, outputs: Sequence[Type], attrs: Attrs) -> Dim:
        product = get_op("linear").flops(types, outputs, {})
        return dim(product + get_op("all_reduce").flops(outputs, outputs, attrs))

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        return get_op("all_reduce").reference(get_op("linear").reference(tensors, {}), attrs)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        x, weight, *bias = tensors
        assert x is not None and weight is not None
        return (collectives.linear_all_reduce(x, weight, *bias, **attrs),)
