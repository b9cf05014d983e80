"""Time cut into spans, so that what lives together with a block is found in few of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from graphopt.memory.planning.problem import Int64, Problem

_FEWEST = 32
"""Blocks that begin in a span at least: fewer would make more spans than is of use."""


class Spans(NamedTuple):
    """Stretches of time, each so long that as many blocks begin in it as live on into it.

    So a block is in two of them on average at most, and what is in its spans is what lives together
    with it, to within a factor.

    Attributes:
        first, last: int64 [blocks]: each block lives in spans first to last.
        counts: int64 [spans]: how many blocks live in each.
    """

    first: Int64
    last: Int64
    counts: Int64


def spans_of(problem: Problem) -> Spans:
    """Return the spans of blocks that all have a lifetime."""
    order = np.argsort(problem.lower, kind="stable")
    lower, upper = problem.lower[order], problem.upper[order]
    # Of each block in order of time, how many of those in front of it live when it begins.
    ended = np.searchsorted(np.sort(upper), lower, side="right")
    alive = (np.arange(len(order)) - ended).tolist()
    begins = [0]
    for block in range(len(order)):
        if block - begins[-1] >= max(alive[block], _FEWEST):
            begins.append(block)
    first, last = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    newest = np.searchsorted(lower, upper, side="left") - 1  # that begins before it ends
    first[order] = np.searchsorted(begins, np.arange(len(order)), side="right") - 1
    last[order] = np.searchsorted(begins, newest, side="right") - 1
    change = np.bincount(first, minlength=len(begins) + 1)
    change[1:] -= np.bincount(last, minlength=len(begins))
    return Spans(first, last, change[:-1].cumsum())
