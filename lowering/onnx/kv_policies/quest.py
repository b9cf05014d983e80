"""Quest's bounds in a graph; see `graphopt.ir.kv_policies.quest`."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.lowering.onnx.kv_policies.frame import places
from graphopt.lowering.onnx.kv_policies.selection import Selection


class Bounds(Selection):
    """The least and the largest feature of each page's keys.

    A step changes one row of them. What a branch gives are places and rows, which are written
    behind it: a buffer that is bound as the old state and the new is changed where it lies.
    """

    def prepare(self) -> None:
        self.frame.newest(self.groups)

    def scores(self, state: list[ir.Value], rows: ir.Value) -> ir.Value:
        # The page of the new key is read whatever its bounds are.
        op, zero = self.op, self.number(0.0)
        # The bounds as the left operand: a right one is copied before it is multiplied.
        columns = op("Transpose", rows, perm=[0, 1, 3, 2])
        products = [
            op("MatMul", bound, op(part, columns, zero))
            for part, bound in zip(("Min", "Max"), state, strict=True)
        ]
        return op("ReduceMax", op("Add", *products), self.constant([3]), keepdims=0)  # type: ignore[no-any-return]

    def observe(
        self, state: list[ir.Value], probabilities: ir.Value | None, k_new: ir.Value
    ) -> list[ir.Value]:
        op, here = self.op, self.frame.newest(self.groups)
        opens = op("Unsqueeze", self.frame.opens, self.constant([3]))
        made = [op("Identity", here)]
        for known, bound in zip(state, ("Min", "Max"), strict=True):
            both = op(bound, op("GatherND", known, here), k_new)
            made.append(op("Where", opens, k_new, both))
        return made

    def begin(self, q: ir.Value, keys: ir.Value) -> list[ir.Value]:
        op, constant, frame = self.op, self.constant, self.frame
        heads = self.attention.heads
        paged = op("Reshape", keys, constant([0, heads.key_heads, -1, frame.page, heads.k_dim]))
        real = op("Equal", frame.bias, self.number(0.0))
        some = op("Cast", real, to=ir.DataType.FLOAT)
        some = op("ReduceMax", some, constant([2]), keepdims=0)
        some = op("Unsqueeze", op("Cast", some, to=ir.DataType.BOOL), constant([1, 3]))
        real = op("Unsqueeze", real, constant([1, 4]))
        made = [places(frame.builder, self.groups, frame.number, frame.pages)]
        for reduce, never in (("ReduceMin", float("inf")), ("ReduceMax", float("-inf"))):
            bound = op(reduce, op("Where", real, paged, self.number(never)), constant([3]),
                       keepdims=0)  # fmt: skip
            made.append(op("Where", some, bound, self.number(0.0)))
        return made

    def after(self, state: list[ir.Value], made: list[ir.Value]) -> list[ir.Value]:
        where, *rows = made
        return [
            self.op("ScatterND", known, where, new) for known, new in zip(state, rows, strict=True)
        ]
