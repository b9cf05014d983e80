"""Votes of a prompt's last queries in a graph; see `graphopt.ir.kv_policies.snapkv`."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.kv_policies import SnapKV
from graphopt.lowering.onnx.kv_policies.selection import Selection


class Votes(Selection):
    """The votes of each page, and the slot from which all is kept."""

    def prepare(self) -> None:
        self.frame.tail(self.policy.history)

    def scores(self, state: list[ir.Value], rows: ir.Value) -> ir.Value:
        op, constant, frame = self.op, self.constant, self.frame
        votes, kept_from = state
        page = op("Div", kept_from, constant(frame.page))
        kept = op("GreaterOrEqual", frame.number, op("Unsqueeze", page, constant([1, 2])))
        newest = op("Add", op("Cast", frame.number, to=ir.DataType.FLOAT), self.number(2.0))
        return op("Where", kept, newest, votes)  # type: ignore[no-any-return]

    def begin(self, q: ir.Value, keys: ir.Value) -> list[ir.Value]:
        op, constant, frame = self.op, self.constant, self.frame
        assert isinstance(self.policy, SnapKV)
        kernel, tail = self.policy.kernel, frame.tail(self.policy.history)
        weights = self.attention.of_tail(frame, tail, q, keys)
        votes = op("ReduceMean", weights, constant([2]), keepdims=0)
        votes = op("ReduceSum", votes, constant([2]), keepdims=0)
        length = op("Add", op("Sub", frame.last, frame.first), constant(1))
        window = op("Min", length, tail.rows)
        count = op("Cast", op("Max", window, constant(1)), to=ir.DataType.FLOAT)
        # Slots behind the last token have no share of its votes.
        total = op("Shape", frame.mask, start=1)
        votes = op("Slice", op("Div", votes, count), constant([0]), total, constant([2]))
        votes = op("AveragePool", votes, kernel_shape=[kernel], pads=[kernel // 2] * 2,
                   count_include_pad=1)  # fmt: skip
        votes = op("Pad", votes, op("Concat", constant([0] * 5), frame.behind, axis=0))
        paged = op("Reshape", votes, constant([0, 0, -1, frame.page]))
        kept = op("Add", op("Sub", frame.last, window), constant(1))
        return [
            op("ReduceSum", paged, constant([3]), keepdims=0),
            op("Squeeze", kept, constant([1, 2])),
        ]
