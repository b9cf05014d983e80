"""Time cut into sections, and the bound that follows from them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from graphopt.memory.planning.problem import Problem


class Sections(NamedTuple):
    """The maximal sets of blocks that live together, in order of time.

    Any two blocks that are alive at once are together in one of them, since intervals that overlap
    pairwise have a point in common. A block is in consecutive ones.

    Attributes:
        first, end: int32 [blocks]: each block is in sections [first, end).
        total: How many sections there are.
    """

    first: npt.NDArray[np.int32]
    end: npt.NDArray[np.int32]
    total: int


def sections_of(problem: Problem) -> Sections:
    """Return the sections of blocks that all have a lifetime.

    A set is maximal from the last beginning of a block on to the next end of one.
    """
    times = np.unique(np.concatenate([problem.lower, problem.upper]))
    begins = np.searchsorted(times, problem.lower)
    ends = np.searchsorted(times, problem.upper)
    is_begin, is_end = np.zeros(len(times), bool), np.zeros(len(times), bool)
    is_begin[begins], is_end[ends] = True, True
    # Of every time, the newest beginning up to it; of an end, the one before it.
    newest = np.maximum.accumulate(np.where(is_begin, np.arange(len(times)), -1))
    maximal = np.unique(newest[np.flatnonzero(is_end) - 1])
    first = np.searchsorted(maximal, begins).astype(np.int32)
    end = np.searchsorted(maximal, ends).astype(np.int32)
    return Sections(first, end, len(maximal))


def live_at_peak(problem: Problem) -> int:
    """Return the most bytes that are alive at once, which no arena can be smaller than."""
    if not len(problem):
        return 0
    times, place = np.unique(np.concatenate([problem.lower, problem.upper]), return_inverse=True)
    change = np.zeros(len(times), np.int64)
    np.add.at(change, place, np.concatenate([problem.padded, -problem.padded]))
    return int(change.cumsum().max())
