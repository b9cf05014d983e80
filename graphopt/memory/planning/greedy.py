"""Plans in one go, in many orders: the best of them is often the bound."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graphopt.memory.planning.problem import Int64, Problem
from graphopt.memory.planning.sections import Sections, sections_of


def greedy_plans(problem: Problem) -> Iterator[tuple[str, Int64]]:
    """Yield plans of blocks that all take room: how each was made, and its offsets.

    Every plan costs blocks times blocks operations of numpy. Those come first that are best on most
    networks.
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
    for name, order in orders.items():
        for best in (True, False):
            how = "best" if best else "first"
            yield f"{name}, {how} fit", fit_in_order(problem, order, best=best)


def fill_valleys(size: Int64, sections: Sections, priority: np.ndarray) -> Int64:
    """Return offsets by filling the lowest valley of the skyline, again and again.

    The block of highest priority among those that lie within the valley goes on its floor; a valley
    that takes none is given up to the height of its lower neighbour.

    Args:
        size: int64 [blocks].
        priority: [blocks]; among equals the larger block goes first.
    """
    # Sorted by priority, so that the first that fits is the one.
    order = np.lexsort((-size, -priority))
    first, end, sizes = sections.first[order], sections.end[order], size[order]
    waits = np.ones(len(order), bool)
    left = np.zeros(sections.total, np.int64)
    np.add.at(left, first, 1)
    np.add.at(left, end[end < sections.total], -1)
    left = left.cumsum()
    # Above all floors: what is finished is a wall, and so is either end of time.
    wall = np.int64(2**63 - 1)
    floor = np.zeros(sections.total + 2, np.int64)
    floor[[0, -1]] = wall
    offsets = np.zeros(len(size), np.int64)
    for _ in range(len(order)):
        while True:
            at = int(floor.argmin())
            height = floor[at]
            higher = np.flatnonzero(floor[at:] > height)
            lo, hi = at, at + int(higher[0])
            within = waits & (first >= lo - 1) & (end <= hi - 1)
            block = int(within.argmax())
            if within[block]:
                break
            floor[lo:hi] = min(floor[lo - 1], floor[hi])
        waits[block] = False
        offsets[order[block]] = height
        span = slice(int(first[block]), int(end[block]))
        left[span] -= 1
        inner = floor[1:-1]
        inner[span] = np.where(left[span] > 0, height + sizes[block], wall)
    return offsets


def fit_in_order(problem: Problem, order: np.ndarray, *, best: bool) -> Int64:
    """Return offsets of blocks placed one after the other where there is room.

    Args:
        order: Indices of the blocks.
        best: Take the smallest gap that is large enough; otherwise the lowest. Above all that is
            placed there always is one.
    """
    size = problem.padded
    count = len(order)
    # Of what is placed, in order of offsets.
    lower, upper = np.empty(count, np.int64), np.empty(count, np.int64)
    bottom, top = np.empty(count, np.int64), np.empty(count, np.int64)
    offsets = np.zeros(count, np.int64)
    for placed, block in enumerate(order):
        beside = np.flatnonzero(
            (lower[:placed] < problem.upper[block]) & (upper[:placed] > problem.lower[block])
        )
        below = np.concatenate([[0], np.maximum.accumulate(top[beside])])
        gaps = bottom[beside] - below[:-1]
        fits = np.flatnonzero(gaps >= size[block])
        if not len(fits):
            offset = below[-1]
        else:
            offset = below[fits[gaps[fits].argmin()] if best else fits[0]]
        offsets[block] = offset
        at = int(np.searchsorted(bottom[:placed], offset))
        for column, value in (
            (lower, problem.lower[block]),
            (upper, problem.upper[block]),
            (bottom, offset),
            (top, offset + size[block]),
        ):
            column[at + 1 : placed + 1] = column[at:placed].copy()
            column[at] = value
    return offsets
