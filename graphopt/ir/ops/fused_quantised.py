"""Ops that lowering makes of linears with packed weights, for kernels that read the codes."""

from __future__ import annotations

from graphopt.ir.ops.base import Attrs, Types, register
from graphopt.ir.ops.fused import FusedLinear
from graphopt.ir.types import Type


@register
class PackedLinear(FusedLinear):
    """`linear` of one x with `parts` packed weights, as one product: -> one output a weight.

    `factors` are the weights [out_i, in], all of one encoding, and behind them as many biases
    [out_i], or none.
    """

    name = "packed_linear"

    def check_encodings(self, types: Types) -> None:
        weights = [kind for kind in types[1:] if kind is not None and kind.encoding is not None]
        if len({kind.encoding for kind in weights}) > 1:
            raise ValueError("packed_linear of weights that are packed in different ways")
        if types and types[0] is not None and types[0].encoding is not None:
            raise ValueError(f"operand 'x' is {types[0]}, and this op reads dense ones")

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        kinds = types[1 : 1 + attrs["parts"]]
        if any(kind is None or kind.encoding is None for kind in kinds):
            raise ValueError("packed_linear of a weight that is not packed")
        return super().infer(types, attrs)
