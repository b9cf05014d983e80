"""Plans in one go, in many orders: the best of them is often the bound."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from graphopt.memory.planning.problem import Int64, Problem
from graphopt.memory.planning.sections import Sections, sections_of
from graphopt.memory.planning.spans import Spans, spans_of

_NONE = 2**62
"""A rank behind all others."""

_AHEAD = 256
"""Blocks of highest priority that are looked at first."""


def greedy_plans(problem: Problem) -> Iterator[tuple[str, Int64]]:
    """Yield plans of blocks that all take room: how each was made, and its offsets.

    A block costs some calls of numpy on what lives together with it, or begins in a valley. Those
    plans come first that are best on most networks.
    """
    sections = sections_of(problem)
    size, length = problem.padded, problem.upper - problem.lower
    spanned = sections.end - sections.first
    area = size.astype(np.float64) * length
    yield "longest first in the lowest valley", fill_valleys(size, sections, spanned)
    yield "largest first in the lowest valley", fill_valleys(size, sections, area)
    orders = {
        "largest area first": np.lexsort((problem.lower, -area)),
        "largest size first": np.lexsort((problem.lower, -length, -size)),
        "longest life first": np.lexsort((problem.lower, -size, -length)),
        "in order of time": np.lexsort((-size, problem.lower)),
    }
    spans = spans_of(problem)
    for name, order in orders.items():
        for best in (True, False):
            how = "best" if best else "first"
            yield f"{name}, {how} fit", fit_in_order(problem, order, spans, best=best)


def fill_valleys(size: Int64, sections: Sections, priority: np.ndarray) -> Int64:
    """Return offsets by filling the lowest valley of the skyline, again and again.

    The block of highest priority among those that lie within the valley goes on its floor; a valley
    that takes none is given up to the height of its lower neighbour.

    Args:
        size: int64 [blocks].
        priority: [blocks]; among equals the larger block goes first.
    """
    waiting = _Waiting(sections, np.lexsort((-size, -priority)))
    skyline = _Skyline(sections)
    first, end, sizes = sections.first.tolist(), sections.end.tolist(), size.tolist()
    offsets = np.zeros(len(size), np.int64)
    for _ in range(len(size)):
        while True:
            height, lo, hi = skyline.lowest()
            block = waiting.best_within(lo, hi)
            if block >= 0:
                break
            skyline.give_up(lo)
        waiting.take(block)
        offsets[block] = height
        skyline.build(lo, first[block], end[block], height + sizes[block])
    return offsets


class _Waiting:
    """The blocks that have no place yet, in order of priority.

    Args:
        order: The blocks, those of highest priority first.
    """

    def __init__(self, sections: Sections, order: np.ndarray) -> None:
        self._order = order.tolist()
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order))
        self._rank = ranks.tolist()
        # By rank, of which all in front of `_next` have a place.
        self._first, self._end = sections.first[order], sections.end[order]
        self._waits = np.ones(len(order), bool)
        self._next = 0
        # By the section in which blocks begin.
        begins = np.argsort(sections.first, kind="stable")
        self._ranks, self._ends = ranks[begins], sections.end[begins]
        places = np.empty(len(order), np.int64)
        places[begins] = np.arange(len(order))
        self._place = places.tolist()
        before = np.searchsorted(sections.first[begins], np.arange(sections.total + 1))
        self._before = before.tolist()

    def best_within(self, lo: int, hi: int) -> int:
        """Return the block of highest priority that lies in sections [lo, hi); -1 for none."""
        begin, end = self._before[lo], self._before[hi]
        if end - begin > 4 * _AHEAD:
            # In a wide valley one of the next ones mostly lies.
            ahead = slice(self._next, self._next + _AHEAD)
            within = self._waits[ahead] & (self._first[ahead] >= lo) & (self._end[ahead] <= hi)
            at = int(within.argmax())
            if within[at]:
                return self._order[self._next + at]
        if begin == end:
            return -1
        ranks = np.where(self._ends[begin:end] <= hi, self._ranks[begin:end], _NONE)
        best = int(ranks.min())
        return -1 if best == _NONE else self._order[best]

    def take(self, block: int) -> None:
        """Let a block wait no more."""
        self._ranks[self._place[block]] = _NONE
        self._waits[self._rank[block]] = False
        while self._next < len(self._order) - 1 and not self._waits[self._next]:
            self._next += 1


class _Skyline:
    """How high sections are filled, as runs of one height; what is finished is in none.

    Neighbouring runs differ in height.
    """

    def __init__(self, sections: Sections) -> None:
        left = np.zeros(sections.total + 1, np.int64)
        np.add.at(left, sections.first, 1)
        np.add.at(left, sections.end, -1)
        self._left = left.cumsum()
        """How many blocks that wait are in each section."""
        # Of each run, by the section in which it begins; and that one by where the run ends.
        self._height = [0] * sections.total
        self._end = [0] * sections.total
        self._begin = {sections.total: 0}
        self._end[0] = sections.total
        self._heap = [(0, 0)]

    def lowest(self) -> tuple[int, int, int]:
        """Return the first of the lowest runs: its height, and its sections [lo, hi)."""
        while True:
            height, lo = self._heap[0]
            hi = self._end[lo]
            if hi and self._height[lo] == height:
                return height, lo, hi
            heapq.heappop(self._heap)

    def give_up(self, lo: int) -> None:
        """Fill the run that begins at `lo` up to its lower neighbour."""
        hi = self._end[lo]
        beside = [self._begin[lo]] if lo in self._begin else []
        beside += [hi] if hi < len(self._end) and self._end[hi] else []
        self._remove(lo)
        self._add(lo, hi, min(self._height[run] for run in beside))

    def build(self, lo: int, first: int, end: int, top: int) -> None:
        """Put a block on sections [first, end) of the run that begins at `lo`, up to `top`."""
        hi, height = self._end[lo], self._height[lo]
        self._remove(lo)
        if lo < first:
            self._add(lo, first, height)
        if end < hi:
            self._add(end, hi, height)
        left = self._left[first:end]
        left -= 1
        if left.all():
            self._add(first, end, top)
            return
        bounds = np.flatnonzero(np.diff(np.concatenate([[False], left > 0, [False]])))
        for begin, stop in (bounds + first).reshape(-1, 2).tolist():
            self._add(begin, stop, top)

    def _remove(self, lo: int) -> None:
        del self._begin[self._end[lo]]
        self._end[lo] = 0

    def _add(self, lo: int, hi: int, height: int) -> None:
        """Add a run, as one with neighbours of its height."""
        before = self._begin.get(lo)
        if before is not None and self._height[before] == height:
            self._remove(before)
            lo = before
        if hi < len(self._end) and self._end[hi] and self._height[hi] == height:
            behind = self._end[hi]
            self._remove(hi)
            hi = behind
        self._height[lo], self._end[lo], self._begin[hi] = height, hi, lo
        heapq.heappush(self._heap, (height, lo))


def fit_in_order(problem: Problem, order: np.ndarray, spans: Spans, *, best: bool) -> Int64:
    """Return offsets of blocks placed one after the other where there is room.

    Args:
        order: Indices of the blocks.
        spans: Of the problem.
        best: Take the smallest gap that is large enough; otherwise the lowest. Above all that is
            placed there always is one.
    """
    lower, upper = problem.lower.tolist(), problem.upper.tolist()
    size = problem.padded.tolist()
    placed = _Placed(spans)
    offsets = np.zeros(len(order), np.int64)
    for block in order.tolist():
        bottoms, tops = placed.beside(block, lower[block], upper[block])
        below = np.maximum.accumulate(tops)
        gaps = bottoms[1:] - below[:-1]
        fits = np.flatnonzero(gaps >= size[block])
        if not len(fits):
            offset = int(below[-1])
        else:
            offset = int(below[fits[gaps[fits].argmin()] if best else fits[0]])
        offsets[block] = offset
        placed.add(block, (offset, offset + size[block], lower[block], upper[block]))
    return offsets


class _Placed:
    """The blocks that have a place: in each span those that live there, in order of offsets.

    The first of each is the ground, on which the lowest stand.
    """

    def __init__(self, spans: Spans) -> None:
        self._first, self._last = spans.first.tolist(), spans.last.tolist()
        bounds = np.concatenate([[0], (spans.counts + 1).cumsum()])
        # Rows: bottom, top, lower, upper. Of each span, the columns that are taken.
        self._table = np.empty((4, bounds[-1]), np.int64)
        ends_of_time = np.iinfo(np.int64)
        self._table[:, bounds[:-1]] = np.array([[-1, 0, ends_of_time.min, ends_of_time.max]]).T
        self._begin, self._end = bounds[:-1].tolist(), (bounds[:-1] + 1).tolist()

    def beside(self, block: int, lower: int, upper: int) -> tuple[Int64, Int64]:
        """Return bottoms and tops of what lives together with a block, in order of bottoms.

        The ground is among them; it and others may be there more than once, without a gap between.
        """
        first, last = self._first[block], self._last[block]
        if first == last:
            near = self._table[:, self._begin[first] : self._end[first]]
        else:
            spans = range(first, last + 1)
            near = np.concatenate(
                [self._table[:, self._begin[span] : self._end[span]] for span in spans], axis=1
            )
        live = (near[2] < upper) & (near[3] > lower)
        bottoms, tops = near[0].compress(live), near[1].compress(live)
        if first != last:
            in_order = bottoms.argsort(kind="stable")  # which merges what is in order already
            bottoms, tops = bottoms[in_order], tops[in_order]
        return bottoms, tops

    def add(self, block: int, column: tuple[int, int, int, int]) -> None:
        """Add a block: its bottom, its top, and its life."""
        table = self._table
        for span in range(self._first[block], self._last[block] + 1):
            begin, end = self._begin[span], self._end[span]
            at = begin + int(table[0, begin:end].searchsorted(column[0], side="right"))
            table[:, at + 1 : end + 1] = table[:, at:end]
            table[:, at] = column
            self._end[span] = end + 1
