"""Attention over keys that are gathered, and the probabilities that policies learn from.

Letters as in `graphopt.lowering.onnx.kv_policies.frame`, and H query heads, h = H / G of them a key
head, D and Dv head sizes, L keys that are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt.ir.kv_policies import KVHeads
from graphopt.lowering.onnx.kv_policies.frame import BLOCKED, Frame, Tail


@dataclass(frozen=True)
class Attention:
    """How an attention scores keys.

    Attributes:
        heads: Its sizes.
        scale, softcap: As for `graphopt.ir.kv_policies.Scoring`.
        sinks: [H], or None.
    """

    heads: KVHeads
    scale: float
    softcap: float | None = None
    sinks: ir.Value | None = None

    @property
    def share(self) -> int:
        """h."""
        return self.heads.query_heads // self.heads.key_heads

    def by_group(self, frame: Frame, q: ir.Value) -> ir.Value:
        """Return queries [B, H, s, D] as rows of their key heads, [B, G, h s, D]."""
        return frame.op(  # type: ignore[no-any-return]
            "Reshape", q, frame.constant([0, self.heads.key_heads, -1, self.heads.k_dim])
        )

    def scores(self, frame: Frame, rows: ir.Value, keys: ir.Value) -> ir.Value:
        """Return the scores [B, G, n, L] of rows [B, G, n, D] with keys [B, G, L, D]."""
        op, number = frame.op, frame.builder.number
        rows = op("Mul", rows, number(self.scale))
        scores = op("MatMul", rows, op("Transpose", keys, perm=[0, 1, 3, 2]))
        if self.softcap is not None:
            cap = number(self.softcap)
            scores = op("Mul", op("Tanh", op("Div", scores, cap)), cap)
        return scores  # type: ignore[no-any-return]

    def softmax(self, frame: Frame, scores: ir.Value) -> ir.Value:
        """Return the softmax of scores [B, G, h, s, L] over the last axis, sinks in its sum."""
        op, constant = frame.op, frame.constant
        if self.sinks is None:
            return op("Softmax", scores, axis=-1)  # type: ignore[no-any-return]
        shape = constant([1, self.heads.key_heads, self.share, 1, 1])
        column = op("Reshape", self.sinks, shape)
        rows = op("Slice", scores, *(constant([x]) for x in (0, 1, -1)))
        column = op("Add", op("Mul", rows, frame.builder.number(0.0)), column)
        weights = op("Softmax", op("Concat", scores, column, axis=-1), axis=-1)
        return op("Slice", weights, *(constant([x]) for x in (0, -1, -1)))  # type: ignore[no-any-return]

    def over(
        self, frame: Frame, rows: ir.Value, keys: ir.Value, values: ir.Value, bias: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Return the output of one token, [B, 1, H Dv], and its probabilities, [B, G, h, L].

        Args:
            rows: Queries [B, G, h, D].
            keys, values: [B, G, L, D] and [B, G, L, Dv].
            bias: [B, G or 1, 1, L], added to scores.
        """
        op, constant = frame.op, frame.constant
        scores = op("Add", self.scores(frame, rows, keys), bias)
        if self.sinks is None:
            weights = op("Softmax", scores, axis=-1)
        else:
            weights = self.softmax(frame, op("Unsqueeze", scores, constant([3])))
            weights = op("Squeeze", weights, constant([3]))
        out = op("MatMul", weights, values)
        width = self.heads.query_heads * self.heads.v_dim
        return op("Reshape", out, constant([0, 1, width])), weights

    def of_prompt(
        self, frame: Frame, q: ir.Value, keys: ir.Value, values: ir.Value, bias: ir.Value
    ) -> ir.Value:
        """Return the output [B, S, H Dv] of queries [B, H, S, D] over all T keys of a cache.

        Args:
            bias: `Frame.causal_bias`.
        """
        op, constant, heads = frame.op, frame.constant, self.heads
        keys, values = (held(frame, x) for x in (keys, values))
        scores = self.scores(frame, self.by_group(frame, q), keys)
        count = op("Shape", bias, start=3)
        split = op("Concat", constant([0, heads.key_heads, self.share, -1]), count, axis=0)
        scores = op("Add", op("Reshape", scores, split), op("Unsqueeze", bias, constant([1])))
        weights = self.softmax(frame, scores)
        merged = op("Concat", constant([0, heads.key_heads, -1]), count, axis=0)
        out = op("MatMul", op("Reshape", weights, merged), values)
        queries = op("Shape", q, start=2, end=3)
        shape = op("Concat", constant([0, heads.query_heads]), queries, constant([-1]), axis=0)
        out = op("Transpose", op("Reshape", out, shape), perm=[0, 2, 1, 3])
        return op("Reshape", out, constant([0, 0, heads.query_heads * heads.v_dim]))  # type: ignore[no-any-return]

    def of_tail(self, frame: Frame, tail: Tail, q: ir.Value, keys: ir.Value) -> ir.Value:
        """Return the probabilities [B, G, h, r, R] of a prompt's last queries.

        They are 0 at keys that a query does not see; see
        `graphopt.ir.kv_policies.probabilities.tail_probabilities`.

        Args:
            q: All queries [B, H, S, D].
            keys: [B, G, R, D].
        """
        op = frame.op
        scores = self.scores(frame, self.by_group(frame, tail.of(frame, q, 2)), keys)
        split = frame.constant([0, self.heads.key_heads, self.share, -1])
        scores = op("Reshape", scores, op("Concat", split, frame.room, axis=0))
        scores = op("Where", tail.seen, scores, frame.builder.number(BLOCKED))
        weights = self.softmax(frame, scores)
        return op("Where", tail.seen, weights, frame.builder.number(0.0))  # type: ignore[no-any-return]

    def pages_of_tail(self, frame: Frame, tail: Tail, q: ir.Value, keys: ir.Value) -> ir.Value:
        """Return the largest probability in each page, over the query heads too: [B, G, r, N]."""
        weights = self.of_tail(frame, tail, q, keys)
        paged = frame.op("Reshape", weights, frame.constant([0, 0, 0, 0, -1, frame.page]))
        return frame.op("ReduceMax", paged, frame.constant([2, 5]), keepdims=0)  # type: ignore[no-any-return]


def held(frame: Frame, x: ir.Value) -> ir.Value:
    """Return the T slots of a cache [B, G, R, D] that hold tokens."""
    op, constant = frame.op, frame.constant
    total = op("Shape", frame.mask, start=1, end=2)
    return op("Slice", x, constant([0]), total, constant([2]))  # type: ignore[no-any-return]


def page_maxima(frame: Frame, weights: ir.Value) -> ir.Value:
    """Return the largest probability [B, G, M] in each page of [B, G, h, M page]."""
    paged = frame.op("Reshape", weights, frame.constant([0, 0, 0, -1, frame.page]))
    return frame.op("ReduceMax", paged, frame.constant([2, 4]), keepdims=0)  # type: ignore[no-any-return]
