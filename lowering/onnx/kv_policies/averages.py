"""Averages of the probabilities that were read in a graph: `ema` and `last-row`.

See `graphopt.ir.kv_policies.moving_average`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.kv_policies.moving_average import UNOBSERVED, MovingAverage
from graphopt.ir.types import B
from graphopt.lowering.onnx.kv_policies.selection import Selection


class Averages(Selection):
    """A number for each page, and the steps since the prompt."""

    def prepare(self) -> None:
        self.frame.tail(self.policy.history)

    def scores(self, state: list[ir.Value], rows: ir.Value) -> ir.Value:
        # A page without a number is the newest, which is always read.
        return state[0]

    def observe(
        self, state: list[ir.Value], probabilities: ir.Value | None, k_new: ir.Value
    ) -> list[ir.Value]:
        assert probabilities is not None
        op, number, share = self.op, self.number, self._share
        known, nought = self._known(state), number(0.0)
        average = op("Add", op("Mul", probabilities, number(share)),
                     op("Mul", known, number(1 - share)))  # fmt: skip
        average = op("Where", op("Less", known, nought), probabilities, average)
        read = op("GreaterOrEqual", probabilities, nought)
        return [op("Where", read, average, known), op("Add", state[1], self.constant(1))]

    def begin(self, q: ir.Value, keys: ir.Value) -> list[ir.Value]:
        op, constant, frame = self.op, self.constant, self.frame
        tail = frame.tail(self.policy.history)
        probabilities = self.attention.pages_of_tail(frame, tail, q, keys)
        before = op("Pad", tail.pages, constant([0, 1, 0, 0, -1, 0]))
        behind = np.arange(tail.history - 1, -1, -1).reshape(1, -1, 1)
        left = constant((1 - self._share) ** behind, np.float32)
        # Of the rows behind a row each leaves 1 - s of it; the first counts whole.
        whole = op("Sub", self.number(1.0), op("Mul", before, self.number(1 - self._share)))
        share = op("Mul", op("Mul", whole, tail.pages), tail.of(frame, left, 1))
        average = op("ReduceSum", op("Mul", probabilities, op("Unsqueeze", share, constant([1]))),
                     constant([2]), keepdims=0)  # fmt: skip
        read = op("Unsqueeze", op("ReduceMax", tail.pages, constant([1]), keepdims=0),
                  constant([1]))  # fmt: skip
        average = op("Where", op("Greater", read, self.number(0.0)), average,
                     self.number(UNOBSERVED))  # fmt: skip
        return [average, no_steps(self)]

    @property
    def _share(self) -> float:
        assert isinstance(self.policy, MovingAverage)
        return self.policy.newest_share

    def _known(self, state: list[ir.Value]) -> ir.Value:
        return self.op("Where", self.frame.fresh, self.number(UNOBSERVED), state[0])  # type: ignore[no-any-return]


def no_steps(selection: Selection) -> ir.Value:
    """Return 0 for each row: int64 [B]."""
    builder = selection.frame.builder
    return selection.op("Expand", selection.constant(0), builder.size(B))  # type: ignore[no-any-return]
