"""Offsets in one buffer for blocks of memory that are needed for a while."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

ALIGNMENT = 512
"""Bytes: as CUDA's allocator aligns. What computes on a CPU needs less."""


@dataclass
class Block:
    """A result of one operation, needed until the last operation that could use it.

    Attributes:
        lower, upper: Numbers of operations: it is needed in [lower, upper).
        bytes: What it has.
        size: What it takes in the buffer.
        offset: Where, once it is placed.
    """

    lower: int
    bytes: int
    upper: int = -1
    size: int = field(init=False)
    offset: int = 0

    def __post_init__(self) -> None:
        self.size = _aligned(self.bytes)

    def grow(self, bytes: int) -> None:
        """Let it take room for more bytes."""
        self.size = _aligned(self.bytes + bytes)


def _aligned(bytes: int) -> int:
    return max(-(-bytes // ALIGNMENT), 1) * ALIGNMENT


def most_at_once(blocks: Sequence[Block]) -> int:
    """Return the most bytes that are needed at once."""
    changes = sorted(change for b in blocks for change in ((b.lower, b.size), (b.upper, -b.size)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def place_blocks(blocks: Sequence[Block]) -> int:
    """Give every block an offset; return how many bytes all take.

    The best of some orders; each block goes into the smallest gap that it fits. On steps of
    networks that is the most that is needed at once, or close to it; `graphopt memory --plan`
    searches further.
    """
    bound, heights = most_at_once(blocks), {}
    for order in _ORDERS:
        heights[order] = _height(sorted(blocks, key=order))
        if heights[order] == bound:
            return bound
    best = min(heights, key=lambda order: heights[order])
    return _height(sorted(blocks, key=best))


_ORDERS: tuple[Callable[[Block], tuple[int, ...]], ...] = (
    lambda b: (-b.size, b.lower - b.upper, b.lower),  # largest first
    lambda b: (b.lower - b.upper, -b.size, b.lower),  # longest first
    lambda b: ((b.lower - b.upper) * b.size, b.lower),  # largest area first
    lambda b: (b.lower, -b.size, -b.upper),  # in order of time
    lambda b: (-b.upper, -b.size, -b.lower),  # against the order of time
)


def _height(order: Sequence[Block]) -> int:
    """Place blocks in this order; return the height."""
    # Of every operation, what is needed at it and has a place: (offset, end).
    taken: dict[int, list[tuple[int, int]]] = {}
    height = 0
    for block in order:
        beside = {place for at in range(block.lower, block.upper) for place in taken.get(at, ())}
        below, best, least = 0, -1, 0
        for offset, end in sorted(beside):
            gap = offset - below
            if gap >= block.size and (best < 0 or gap < least):
                best, least = below, gap
            below = max(below, end)
        block.offset = best if best >= 0 else below
        end = block.offset + block.size
        height = max(height, end)
        for at in range(block.lower, block.upper):
            insort(taken.setdefault(at, []), (block.offset, end))
    return height
