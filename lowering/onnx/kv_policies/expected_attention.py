"""Expected attention in a graph; see `graphopt.ir.kv_policies.expected_attention`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.kv_policies import ExpectedAttention
from graphopt.ir.types import B
from graphopt.lowering.onnx.kv_policies.frame import BLOCKED
from graphopt.lowering.onnx.kv_policies.selection import Selection


class ExpectedMass(Selection):
    """Mean and covariance of the prompt's queries, and the logarithm of each page's sum."""

    def prepare(self) -> None:
        self.frame.tail(self.policy.history)
        self.frame.newest(self.groups)

    def scores(self, state: list[ir.Value], rows: ir.Value) -> ir.Value:
        shares = self.op("Softmax", self._known(state), axis=-1)
        return self.op("ReduceMean", shares, self.constant([2]), keepdims=0)  # type: ignore[no-any-return]

    def observe(
        self, state: list[ir.Value], probabilities: ir.Value | None, k_new: ir.Value
    ) -> list[ir.Value]:
        op, frame = self.op, self.frame
        mean, covariance, _ = state
        known, term = self._known(state), self._log_terms(mean, covariance, k_new)
        # log(exp(a) + exp(b)); what stands in no page yet is -inf, the new key's term is not.
        most = op("Max", known, term)
        total = op("Add", op("Exp", op("Sub", known, most)), op("Exp", op("Sub", term, most)))
        total = op("Add", op("Log", total), most)
        here = op("Equal", frame.number, frame.last_page)
        here = op("Unsqueeze", here, self.constant([1]))
        return [*(op("Identity", x) for x in (mean, covariance)), op("Where", here, total, known)]

    def begin(self, q: ir.Value, keys: ir.Value) -> list[ir.Value]:
        op, constant, frame = self.op, self.constant, self.frame
        attention, tail = self.attention, frame.tail(self.policy.history)
        last = op("Mul", tail.of(frame, q, 2), self.number(attention.scale))
        last = self._of_positions_ahead(last)
        split = [0, self.groups, attention.share, -1, attention.heads.k_dim]
        rows = op("Reshape", last, constant(split))  # [B, G, h, r, D]
        real = op("Cast", op("Unsqueeze", tail.real, constant([1, 2])), to=ir.DataType.FLOAT)
        count = op("ReduceSum", real, constant([3]), keepdims=0)  # [B, 1, 1, 1]
        mean = op("ReduceSum", op("Mul", rows, real), constant([3]), keepdims=0)
        mean = op("Div", mean, count)
        centred = op("Mul", op("Sub", rows, op("Unsqueeze", mean, constant([3]))), real)
        covariance = op("MatMul", op("Transpose", centred, perm=[0, 1, 2, 4, 3]), centred)
        covariance = op("Div", covariance, op("Unsqueeze", count, constant([4])))
        terms = self._log_terms(mean, covariance, keys)  # [B, G, h, R]
        seen = op("Unsqueeze", frame.seen, constant([1, 2]))
        terms = op("Where", seen, terms, self.number(float("-inf")))
        paged = op("Reshape", terms, constant([0, 0, 0, -1, frame.page]))
        most = op("ReduceMax", paged, constant([4]), keepdims=1)
        most = op("Max", most, self.number(BLOCKED))  # finite, so that no difference is NaN
        total = op("ReduceSum", op("Exp", op("Sub", paged, most)), constant([4]), keepdims=0)
        logs = op("Add", op("Log", total), op("Squeeze", most, constant([4])))
        return [mean, covariance, logs]

    def _known(self, state: list[ir.Value]) -> ir.Value:
        fresh = self.op("Unsqueeze", self.frame.fresh, self.constant([1]))
        return self.op("Where", fresh, self.number(float("-inf")), state[2])  # type: ignore[no-any-return]

    def _log_terms(self, mean: ir.Value, covariance: ir.Value, keys: ir.Value) -> ir.Value:
        """Return the logarithm of the expectation of exp(q k) of each key [B, G, n, D].

        Args:
            mean, covariance: [B, G, h, D] and [B, G, h, D, D].

        Returns:
            [B, G, h, n].
        """
        op, constant = self.op, self.constant
        linear = op("MatMul", mean, op("Transpose", keys, perm=[0, 1, 3, 2]))
        k = op("Unsqueeze", keys, constant([2]))
        square = op("Mul", op("MatMul", k, covariance), k)
        square = op("ReduceSum", square, constant([-1]), keepdims=0)
        return op("Add", linear, op("Mul", square, self.number(0.5)))  # type: ignore[no-any-return]

    def _of_positions_ahead(self, q: ir.Value) -> ir.Value:
        """Return queries [B, H, r, D] turned to the last position, and by those to come."""
        policy = self.policy
        assert isinstance(policy, ExpectedAttention)
        op, constant, pairs = self.op, self.constant, len(policy.frequencies)
        if not pairs:
            return q
        tail = self.frame.tail(policy.history)
        since = np.arange(policy.history - 1, -1, -1.0)
        ahead = np.arange(1.0, policy.ahead + 1)
        angles = (since[:, None, None] + ahead[:, None]) * np.array(policy.frequencies)
        tables = [
            constant(table, np.float32)
            for table in (np.cos(angles).mean(1), np.sin(angles).mean(1))
        ]
        # Row n of the tables is that of the query n places behind the oldest.
        row = tail.of(self.frame, constant(np.arange(policy.history)), 0)
        row = op("Expand", row, op("Concat", self.frame.builder.size(B), tail.rows, axis=0))
        rest = self.attention.heads.k_dim - 2 * pairs
        rotated, *others = (
            op("Split", q, constant([2 * pairs, rest]), axis=3, outputs=2) if rest else [q]
        )
        turned = op("RotaryEmbedding", rotated, *tables, row, interleaved=int(policy.interleaved))
        return op("Concat", turned, *others, axis=3) if others else turned  # type: ignore[no-any-return]
