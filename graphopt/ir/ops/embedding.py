"""Table look-ups."""

from __future__ import annotations

import sympy
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.ops.base import Attrs, Offset, Op, Tensors, Types, need, register
from graphopt.ir.types import Dim, Type, dim


@register
class Embedding(Op):
    """Rows `ids` [...] plus `offset` of weight [rows, N] -> [..., N].

    `offset` is for learned positions that start in the table's third row (OPT).
    """

    name = "embedding"
    operands = ("ids", "weight")
    attributes = {"offset": Offset}  # noqa: RUF012
    defaults = {"offset": 0}  # noqa: RUF012
    encoded = ("weight",)

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        ids, weight = need(types, 0), need(types, 1)
        if len(weight.shape) != 2 or ids.dtype.is_floating_point:
            raise ValueError(f"embedding of {ids} in {weight}")
        if weight.encoding is not None and weight.encoding.axis != 1:
            raise ValueError(f"embedding in {weight}: rows are looked up where axis 1 is packed")
        return [Type((*ids.shape, weight.shape[1]), weight.dtype)]

    def flops(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        return 0

    def bytes(self, types: Types, outputs: list[Type], attrs: Attrs) -> Dim:  # type: ignore[override]
        ids, weight = need(types, 0), need(types, 1)
        row = sympy.Rational(int(weight.bytes), int(weight.shape[0]))
        return dim(outputs[0].bytes + ids.numel * row + ids.bytes)

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        ids, weight = tensors
        assert ids is not None and weight is not None
        rows = ids + attrs.get("offset", 0)
        # Indexing would count negative ids from the end.
        return (weight.index_select(0, rows.flatten()).view(*rows.shape, weight.shape[1]),)

    def torch(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        ids, weight = tensors
        assert ids is not None and weight is not None
        offset = attrs.get("offset", 0)
        return (F.embedding(ids + offset if offset else ids, weight),)
