"""Where the keys of a graph's caches lie, which all attentions of the graph share.

A cache has room for R slots, a multiple of the page, of which T hold keys: the graph writes new
ones behind those that there are, and gives the cache back in the same size. So whoever runs it may
bind one buffer as what comes in and what goes out, and nothing is copied.

Everything here is made in front of the branches that read it.

Letters: B batch, G key heads, S new tokens, P tokens before them, T both, R slots of a cache, N
pages of R slots, r queries at the end of a prompt.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.ir.kv_policies import PageBudget
from graphopt.ir.types import B, P, S
from graphopt.lowering.onnx.builder import GraphBuilder

# Far below any score, and far enough above the smallest float that adding a score to it stays
# finite: a row without a key gives a plain mean instead of NaN.
BLOCKED = -1e30


def write_tokens(
    builder: GraphBuilder, shared: dict[Any, Any], past: ir.Value, new: ir.Value, groups: int
) -> ir.Value:
    """Return a cache [B, G, R, D] with new rows [B, G, S, D] from slot P on.

    Args:
        shared: Where the places of the rows are kept for other layers.
    """
    key = ("places of rows", groups)
    if key not in shared:
        scope, builder.scope = builder.scope, "pages"
        slots = builder.op("Range", builder.scalar(P), builder.scalar(P + S), builder.constant(1))
        shared[key] = places(builder, groups, slots, builder.size(S))
        builder.scope = scope
    return builder.op("ScatterND", past, shared[key], new)  # type: ignore[no-any-return]


def places(builder: GraphBuilder, groups: int, rows: ir.Value, count: ir.Value) -> ir.Value:
    """Return indices [B, G, n, 3] of rows in a tensor [B, G, rows, ...].

    Args:
        rows: int64 [n], or [B, 1, n] where they differ.
        count: n, int64 [1].
    """
    op, constant = builder.op, builder.constant
    batch = op("Range", constant(0), builder.scalar(B), constant(1))
    shape = op("Concat", builder.size(B), constant([groups]), count, constant([1]), axis=0)
    parts = [
        op("Unsqueeze", batch, constant([1, 2, 3])),
        constant(np.arange(groups).reshape(1, groups, 1, 1)),
        op("Unsqueeze", rows, constant([-1])),
    ]
    return op("Concat", *(op("Expand", part, shape) for part in parts), axis=3)  # type: ignore[no-any-return]


class Frame:
    """The slots and pages of caches, by a padding mask and a size of page.

    Args:
        mask: int64 [B, T], 1 at real tokens.
        past: Keys [B, G, R, D].

    Attributes:
        room, behind, pages: R, R - T and N, int64 [1].
        number: int64 [N], the pages' numbers.
        first, last: int64 [B, 1, 1], the slots of the first and of the last real key.
        first_page, last_page: Theirs.
        opens: bool [B, 1, 1], whether the last key is the first of its page.
        present: bool [B, 1, N], whether a page holds a real key.
        fresh: bool [B, 1, N], whether a page held none before the last token.
        seen: bool [B, R], whether a slot holds a real key.
        bias: fp32 [B, N, page], 0 at real keys and `BLOCKED` elsewhere.
        alone: bool scalar, whether one token follows others.
    """

    def __init__(
        self,
        builder: GraphBuilder,
        shared: dict[Any, Any],
        mask: ir.Value,
        past: ir.Value,
        page: int,
    ) -> None:
        self.builder, self.mask, self.page, self.shared = builder, mask, page, shared
        self.op, self.constant = builder.op, builder.constant
        op, constant, size = builder.op, builder.constant, builder.constant(page)
        self._made: dict[Hashable, Any] = {}
        scope, builder.scope = builder.scope, "pages"
        self.room = op("Shape", past, start=2, end=3)
        self.pages = op("Div", self.room, size)
        count = op("Squeeze", self.pages, constant([0]))
        self.number = op("Range", constant(0), count, constant(1))
        self.first, self.last = (
            op(
                "Unsqueeze",
                op("ArgMax", mask, axis=1, keepdims=1, select_last_index=at_end),
                constant([2]),
            )
            for at_end in (0, 1)
        )
        self.first_page, self.last_page = (op("Div", x, size) for x in (self.first, self.last))
        above = op("GreaterOrEqual", self.number, self.first_page)
        self.present = op("And", above, op("LessOrEqual", self.number, self.last_page))
        opens = op("Equal", op("Mod", self.last, size), constant(0))
        self.opens = op("Or", opens, op("Equal", self.last, self.first))
        newest = op("And", op("Equal", self.number, self.last_page), self.opens)
        self.fresh = op("Or", op("Greater", self.number, self.last_page), newest)
        self.behind = op("Sub", self.room, builder.size(P + S))
        padded = op("Pad", mask, op("Concat", constant([0, 0, 0]), self.behind, axis=0))
        self.seen = op("Cast", padded, to=ir.DataType.BOOL)  # [B, R]
        bias = op("Where", self.seen, builder.number(0.0), builder.number(BLOCKED))
        self.bias = op("Reshape", bias, constant([0, -1, page]))
        one = op("Equal", builder.scalar(S), constant(1))
        self.alone = op("And", one, op("Greater", builder.scalar(P), constant(0)))
        builder.scope = scope

    @classmethod
    def of(
        cls,
        builder: GraphBuilder,
        shared: dict[Any, Any],
        mask: ir.Value,
        past: ir.Value,
        page: int,
    ) -> Frame:
        """Return the frame of a mask and a page, made once a graph."""
        key = ("pages", mask, page)
        if key not in shared:
            shared[key] = cls(builder, shared, mask, past, page)
        made: Frame = shared[key]
        return made

    def once(self, key: Hashable, make: Any) -> Any:
        """Return what was made under a key, or make it; in front of any branch."""
        if key not in self._made:
            scope, self.builder.scope = self.builder.scope, "pages"
            self._made[key] = make()
            self.builder.scope = scope
        return self._made[key]

    def fixed(self, budget: PageBudget) -> ir.Value:
        """Return what is added to scores: inf at pages that are always read, -inf at absent ones.

        fp32 [B, 1, N].
        """
        return self.once(("fixed", budget), lambda: self._fixed(budget))  # type: ignore[no-any-return]

    def _fixed(self, budget: PageBudget) -> ir.Value:
        op, constant, number = self.op, self.constant, self.builder.number
        first, last = self.first_page, self.last_page
        sink = op("Less", self.number, op("Add", first, constant(budget.sink)))
        local = op("Greater", self.number, op("Sub", last, constant(budget.local)))
        few = op("Less", op("Sub", last, first), constant(budget.pages))
        always = op("Or", op("Or", sink, local), few)
        chosen = op("Where", always, number(float("inf")), number(0.0))
        return op("Where", self.present, chosen, number(float("-inf")))  # type: ignore[no-any-return]

    def read(self, budget: PageBudget) -> ir.Value:
        """Return how many pages are taken: min(M, N), int64 [1]."""
        most = self.constant([budget.pages])
        return self.once(  # type: ignore[no-any-return]
            ("read", budget.pages), lambda: self.op("Min", self.pages, most)
        )

    def shape(self, groups: int, *rest: ir.Value) -> ir.Value:
        """Return [B, G, ...] as an int64 vector."""
        builder = self.builder
        return self.once(  # type: ignore[no-any-return]
            ("shape", groups, *rest),
            lambda: self.op("Concat", builder.size(B), self.constant([groups]), *rest, axis=0),
        )

    def unread(self, groups: int) -> ir.Value:
        """Return -1 for each page, fp32 [B, G, N]: probabilities of which none is known."""
        shape = self.shape(groups, self.pages)
        return self.once(  # type: ignore[no-any-return]
            ("unread", groups), lambda: self.op("Expand", self.builder.number(-1.0), shape)
        )

    def biases(self, groups: int) -> ir.Value:
        """Return `bias` for each key head, fp32 [B, G, N, page]."""
        shape = self.shape(groups, self.pages, self.constant([self.page]))
        return self.once(  # type: ignore[no-any-return]
            ("biases", groups),
            lambda: self.op("Expand", self.op("Unsqueeze", self.bias, self.constant([1])), shape),
        )

    def newest(self, groups: int) -> ir.Value:
        """Return the place of the page of the last key: int64 [B, G, 1, 3]."""
        return self.once(  # type: ignore[no-any-return]
            ("newest", groups),
            lambda: places(self.builder, groups, self.last_page, self.constant([1])),
        )

    def tail(self, history: int) -> Tail:
        """Return the last queries of a prompt, at most so many."""
        return self.once(("tail", history), lambda: Tail(self, history))  # type: ignore[no-any-return]

    def causal_bias(self) -> ir.Value:
        """Return 0 where a query sees a key and `BLOCKED` elsewhere: fp32 [B, 1, S, T]."""
        return self.once("causal", self._causal_bias)  # type: ignore[no-any-return]

    def _causal_bias(self) -> ir.Value:
        op, constant, builder = self.op, self.constant, self.builder
        keys, queries = (
            op("Range", start, builder.scalar(P + S), constant(1))
            for start in (constant(0), builder.scalar(P))
        )
        causal = op("LessOrEqual", keys, op("Unsqueeze", queries, constant([1])))
        real = op("Unsqueeze", op("Cast", self.mask, to=ir.DataType.BOOL), constant([1, 2]))
        seen = op("And", real, causal)
        return op("Where", seen, builder.number(0.0), builder.number(BLOCKED))  # type: ignore[no-any-return]


class Tail:
    """The last queries of each row of a prompt.

    Attributes:
        history: How many at most.
        rows: r, int64 [1].
        stands: int64 [B, r, 1], the slot of each.
        real: bool [B, r, 1], whether it stands at or behind the row's first key.
        seen: bool [B, 1, 1, r, R], which keys each sees.
        pages: fp32 [B, r, N], 1 at the pages that each reads.
    """

    def __init__(self, frame: Frame, history: int) -> None:
        op, constant, builder = frame.op, frame.constant, frame.builder
        self.history = history
        self.rows = op("Min", builder.size(S), constant([history]))
        behind = constant(np.arange(history - 1, -1, -1).reshape(1, -1, 1))
        self.stands = op("Sub", frame.last, self.of(frame, behind, 1))
        self.real = op("GreaterOrEqual", self.stands, frame.first)
        room = op("Squeeze", frame.room, constant([0]))
        slot = op("Range", constant(0), room, constant(1))
        seen = op("LessOrEqual", slot, self.stands)
        seen = op("And", op("And", seen, self.real), op("Unsqueeze", frame.seen, constant([1])))
        self.seen = op("Unsqueeze", seen, constant([1, 2]))
        size = constant(frame.page)
        up_to = op("LessOrEqual", frame.number, op("Div", self.stands, size))
        read = op("And", up_to, op("GreaterOrEqual", frame.number, frame.first_page))
        self.pages = op("Cast", op("And", read, self.real), to=ir.DataType.FLOAT)

    def of(self, frame: Frame, x: ir.Value, axis: int) -> ir.Value:
        """Return the last r along an axis."""
        start, end = frame.op("Neg", self.rows), frame.constant([np.iinfo(np.int64).max])
        return frame.op("Slice", x, start, end, frame.constant([axis]))  # type: ignore[no-any-return]
