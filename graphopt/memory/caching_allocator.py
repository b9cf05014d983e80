"""A model of torch's caching allocator for GPUs: what a sequence of requests makes it hold.

It follows the rules of `CUDACachingAllocator` with its default settings, on one stream: sizes are
rounded up to 512 bytes; requests of up to 1 MiB live in segments of 2 MiB, others in segments of
20 MiB or of their own size rounded up to 2 MiB; the smallest free block that is large enough is
taken, and cut where what is left is worth it; free neighbours in a segment are merged; and where
memory runs out, segments without a block in use go back to the driver before a request fails.
A CUDA graph that is recorded has segments of its own, and meanwhile none go back.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

ROUND = 512
_SMALL = 2**20
_SMALL_SEGMENT = 2 * 2**20
_LARGE_SEGMENT = 20 * 2**20
_OWN_SEGMENT = 10 * 2**20
_ROUND_SEGMENT = 2 * 2**20


class OutOfMemory(Exception):
    """A request that does not fit.

    Args:
        asked: Bytes of the request.
        reserved: Bytes of all segments that could not be given back.
    """

    def __init__(self, asked: int, reserved: int) -> None:
        super().__init__(f"{asked} bytes do not fit beside {reserved}")
        self.asked, self.reserved = asked, reserved


@dataclass(eq=False, slots=True)
class Block:
    """A part of a segment.

    Attributes:
        address: Where it begins; segments have addresses in the order in which they were made.
        size: Its bytes, which may be more than were asked for.
        pool: Which pool it belongs to: the number of the recording, 0 for none, and whether it is
            small.
        used: Whether it is given out.
        before, behind: Its neighbours in the segment.
    """

    address: int
    size: int
    pool: tuple[int, bool]
    used: bool = False
    before: Block | None = None
    behind: Block | None = None


class CachingAllocator:
    """Serves requests as torch's allocator does.

    Args:
        limit: Bytes of all segments, as `torch.cuda.set_per_process_memory_fraction` limits them;
            None for no limit.

    Attributes:
        allocated, reserved: Bytes of the blocks in use, and of all segments.
        peak_allocated, peak_reserved: The most that they ever were.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._free: dict[tuple[int, bool], list[tuple[int, int, Block]]] = {}
        self._next = self._recording = self._recordings = 0

    def malloc(self, size: int) -> Block | None:
        """Return a block for a request; None for one of no bytes, which takes none.

        Raises:
            OutOfMemory: It does not fit the limit.
        """
        if size == 0:
            return None
        size = -(-size // ROUND) * ROUND
        small = size <= _SMALL
        pool = self._free.setdefault((self._recording, small), [])
        place = bisect.bisect_left(pool, (size, -1))  # type: ignore[arg-type]
        block = pool.pop(place)[2] if place < len(pool) else self._segment(size, small)
        left = block.size - size
        if left >= ROUND if small else left > _SMALL:
            rest = Block(block.address + size, left, block.pool, before=block, behind=block.behind)
            if rest.behind is not None:
                rest.behind.before = rest
            block.size, block.behind = size, rest
            self._put(rest)
        block.used = True
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block | None) -> None:
        """Take a block back."""
        if block is None:
            return
        self.allocated -= block.size
        block.used = False
        before, behind = block.before, block.behind
        if behind is not None and not behind.used:
            self._take(behind)
            self._absorb(block, behind)
        if before is not None and not before.used:
            self._take(before)
            self._absorb(before, block)
            block = before
        self._put(block)

    def release_cached(self) -> None:
        """Give the segments back in which no block is in use (`torch.cuda.empty_cache`).

        Those of a recorded graph stay with it.
        """
        for key, pool in self._free.items():
            if not key[0]:
                whole = [e for e in pool if e[2].before is None and e[2].behind is None]
                self.reserved -= sum(size for size, _, _ in whole)
                self._free[key] = [e for e in pool if e not in whole]

    def begin_recording(self) -> None:
        """From now on a CUDA graph is recorded, as by `torch.cuda.graph`."""
        self.release_cached()
        self._recordings += 1
        self._recording = self._recordings

    def end_recording(self) -> None:
        """The graph keeps its segments."""
        self._recording = 0

    def _segment(self, size: int, small: bool) -> Block:
        if small:
            bytes_of_segment = _SMALL_SEGMENT
        elif size < _OWN_SEGMENT:
            bytes_of_segment = _LARGE_SEGMENT
        else:
            bytes_of_segment = -(-size // _ROUND_SEGMENT) * _ROUND_SEGMENT
        if self.limit is not None and self.reserved + bytes_of_segment > self.limit:
            if not self._recording:
                self.release_cached()
            if self.reserved + bytes_of_segment > self.limit:
                raise OutOfMemory(size, self.reserved)
        self.reserved += bytes_of_segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = Block(self._next, bytes_of_segment, (self._recording, small))
        self._next += bytes_of_segment
        return block

    def _put(self, block: Block) -> None:
        bisect.insort(self._free[block.pool], (block.size, block.address, block))

    def _take(self, block: Block) -> None:
        pool = self._free[block.pool]
        place = bisect.bisect_left(pool, (block.size, block.address))  # type: ignore[arg-type]
        del pool[place]

    @staticmethod
    def _absorb(block: Block, behind: Block) -> None:
        block.size += behind.size
        block.behind = behind.behind
        if behind.behind is not None:
            behind.behind.before = block
