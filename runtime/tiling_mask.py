"""The tiling-mask: every block of an attention mask as a window of one small triangular table.

A causal mask of S x S grows with S squared. All its blocks of BLOCK_M rows by BLOCK_N keys,
though, look alike up to a shift, so that one table of 2 M x 2 M, M the longest side of a block,
holds them all; M does not depend on S. FastAttention (arXiv 2410.16663, tiling-mask) calls the
table M-mask and its windows B-masks. CANN's attention operators take such a table too
(`sparse_mode` 2 to 4, 2048 x 2048). Runs with torch alone.

Letters: S query rows, T keys, q0 and k0 a block's first row and key. Row i stands at key i + shift:
shift = T - S where the causal diagonal ends in the lower right corner, 0 where it starts in the
upper left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Block = tuple[int, int]
"""Rows and keys of a block: BLOCK_M, BLOCK_N."""


def table(
    half: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float16,
    *,
    heads: int = 1,
) -> Tensor:
    """Return the table: [2 half heads, 2 half], 1 where column > row // heads (not seen), else 0.

    Args:
        half: M, at least the longest side of every block looked up.
        dtype: fp16 by default, which kernels read.
        heads: Rows a token has in a block, one behind the other: query heads that share keys.

    Raises:
        ValueError: `half` is less than 1.
    """
    if half < 1:
        raise ValueError(f"half a side of the table is {half}: give a number from 1 up")
    ones = torch.ones(2 * half, 2 * half, dtype=dtype, device=device)
    return ones.triu(1).repeat_interleave(heads, 0)


def table_bytes(half: int, element: int = 2, *, heads: int = 1) -> int:
    """Return the bytes of a table, whatever the number of queries and keys."""
    return (2 * half) ** 2 * heads * element


def corner(delta: int, block: Block) -> tuple[int, int]:
    """Return row and column of the table at which the window of a block starts.

    The window has 1 where, inside the block, column > row + `delta`. A shift beyond the block's
    sides gives the same as one at them, so it is clamped to them and the window stays inside.
    """
    rows, keys = block
    return min(max(delta, 0), keys), min(max(-delta, 0), rows)


def lookup(whole: Tensor, delta: int, block: Block, heads: int = 1) -> Tensor:
    """Return the window [BLOCK_M, BLOCK_N] of the table: 1 where column > row // heads + `delta`.

    Args:
        whole: The table for as many `heads`.

    Raises:
        ValueError: A side of the block is longer than half the table's.
    """
    rows, keys = block
    if 2 * max(block) > whole.shape[1]:
        raise ValueError(f"blocks of {block} need a table of at least {2 * max(block)} columns")
    row, column = corner(delta, block)
    return whole[row * heads : row * heads + rows, column : column + keys]


@dataclass(frozen=True)
class Band:
    """Which keys a row sees: those from `low` up to `high` behind the key it stands at.

    Attributes:
        queries, keys: S and T.
        causal: Up to the key the row stands at, and none behind.
        window: Keys seen, that key included; None or 0 for all.
        top_left: Row i stands at key i rather than T - S + i.
    """

    queries: int
    keys: int
    causal: bool = True
    window: int | None = None
    top_left: bool = False

    @property
    def shift(self) -> int:
        return 0 if self.top_left else self.keys - self.queries

    def dense(self) -> Tensor:
        """Return the whole mask, bool [S, T], True where a key is seen."""
        place = torch.arange(self.queries)[:, None] + self.shift
        key = torch.arange(self.keys)[None, :]
        seen = torch.ones(self.queries, self.keys, dtype=torch.bool)
        if self.causal:
            seen &= key <= place
        if self.window:
            seen &= key > place - self.window
        return seen

    def block_mask(self, whole: Tensor, q0: int, k0: int, block: Block) -> Tensor:
        """Return a block of the mask from the table, bool [BLOCK_M, BLOCK_N], True where seen.

        The upper edge is one window. The lower edge, of a sliding window, is a second one, whose
        ones are what is seen. The end of the keys is a row of the table.
        """
        rows, keys = block
        delta = self.shift + q0 - k0
        unseen = torch.zeros(rows, keys, dtype=torch.bool)
        if self.causal:
            unseen = unseen | lookup(whole, delta, block).bool()
        if self.window:
            unseen = unseen | ~lookup(whole, delta - self.window, block).bool()
        end = whole[min(self.keys - 1 - k0, keys), :keys].bool()
        return ~(unseen | end[None, :])

    def stretches(self, q0: int, block: Block) -> tuple[int, int, int, int]:
        """Return (low, inner_low, inner_high, high) for the rows from `q0` on, in keys.

        Outside [low, high) no row sees a key: those blocks are skipped. Inside [inner_low,
        inner_high), which are multiples of BLOCK_N, every row sees every key: no mask is read.
        """
        rows, keys = block
        first = q0 + self.shift
        last = first + rows - 1
        low, high = 0, self.keys
        inner_low, inner_high = 0, self.keys // keys * keys
        if self.causal:
            high = min(high, max(last + 1, 0))
            inner_high = min(inner_high, max(first + 1, 0) // keys * keys)
        if self.window:
            low = max(first - self.window + 1, 0) // keys * keys
            inner_low = -(-max(last - self.window + 1, 0) // keys) * keys
        inner_low = min(max(inner_low, low), high)
        inner_high = min(max(inner_high, inner_low), high)
        return low, inner_low, inner_high, high

    def classify(self, q0: int, k0: int, block: Block) -> str:
        """Return what becomes of a block of BLOCK_M rows: `skip`, `full` or `masked`."""
        low, inner_low, inner_high, high = self.stretches(q0, block)
        if k0 + block[1] <= low or k0 >= high:
            return "skip"
        return "full" if inner_low <= k0 and k0 + block[1] <= inner_high else "masked"

    def counts(self, block: Block) -> dict[str, int]:
        """Return how many blocks are skipped, read without a mask, and read with one.

        In closed form for each block of rows; no block of the mask is built.
        """
        rows, keys = block
        across = -(-self.keys // keys)
        found = {"skip": 0, "full": 0, "masked": 0}
        for q0 in range(0, self.queries, rows):
            low, inner_low, inner_high, high = self.stretches(q0, block)
            walked = max(-(-high // keys) - low // keys, 0)
            full = (inner_high - inner_low) // keys
            found["skip"] += across - walked
            found["full"] += full
            found["masked"] += walked - full
        return found
