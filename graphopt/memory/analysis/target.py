"""Choices of what to move away or to compute again until a peak is low enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from graphopt.memory.analysis.intervals import access_intervals
from graphopt.memory.analysis.link import Link
from graphopt.memory.analysis.periods import Period
from graphopt.memory.analysis.recompute import Recompute, recompute_candidates
from graphopt.memory.analysis.swap import Away, Candidate, has_times, queue, swap_candidates
from graphopt.memory.trace import Trace

Int64 = npt.NDArray[np.int64]

LEAST_SHARE = 1e-4
"""Of the peak: smaller blocks are not worth a choice."""


@dataclass(frozen=True)
class Choice:
    """One block that is away for one interval.

    Attributes:
        how: "swap" to the host and back, or "recompute".
        instance: Index of the instance.
        first, second: Events of the accesses between which it is away.
        size: Bytes.
        cost: Time that it adds to a run, in units of the trace's clock: none for a swap, whose
            copies fit into the interval.
        peak: Bytes at the peak with this choice and those before.
    """

    how: Literal["swap", "recompute"]
    instance: int
    first: int
    second: int
    size: int
    cost: int
    peak: int


@dataclass(frozen=True)
class Reached:
    """What choices make of a peak.

    Attributes:
        target: Bytes that were asked for.
        before, after: Bytes at the peak without and with the choices.
        choices: In the order in which they were made.
        left: Why no more were made; "" if the target was reached.
    """

    target: int
    before: int
    after: int
    choices: list[Choice] = field(default_factory=list)
    left: str = ""


class _Timeline:
    """The bytes alive after each event of a window, without blocks that are away."""

    def __init__(self, trace: Trace, window: tuple[int, int], duration: int | None) -> None:
        self.begin, self.stop = window
        self.times = trace.time_ns[self.begin : self.stop].astype(np.float64)
        self.live = trace.live_bytes()[self.begin : self.stop]
        self.duration = duration

    def without(
        self, aways: Sequence[Away], swaps: Sequence[Candidate], again: Sequence[Recompute]
    ) -> Int64:
        """Return int64 [events of the window]: what is alive with these choices."""
        change = np.zeros(len(self.live) + 1, np.int64)
        for away, swap in zip(aways, swaps, strict=True):
            for turn in (0,) if self.duration is None else (0, -1):
                shift = turn * (self.duration or 0)
                self._lower(change, away.start + shift, away.stop + shift, swap.size)
        for one in again:
            # It is back, with all that it was computed from, in front of the event that reads it.
            low, back = max(one.first + 1 - self.begin, 0), one.second - 1 - self.begin
            if low <= back:
                change[low] -= one.size
                change[back] += one.size + one.extra
                change[back + 1] -= one.extra
        return self.live + np.cumsum(change[:-1])

    def _lower(self, change: Int64, start: float, stop: float, size: int) -> None:
        """Take a block out of the events between which it is away all the time."""
        first = int(np.searchsorted(self.times, start, "left"))
        behind = int(np.searchsorted(self.times, stop, "right")) - 1
        if stop > self.times[-1]:
            behind = len(self.times)
        if first < behind:
            change[first] -= size
            change[behind] += size


def reach_target(
    trace: Trace,
    target: int,
    link: Link,
    period: Period | None = None,
    *,
    swaps: bool = True,
    recomputes: bool = True,
) -> Reached:
    """Choose blocks to move away or to compute again until the peak is at most `target` bytes.

    Swaps come first, as they cost no time: of those over the peak as it then is, the one with most
    bytes times time away. All copies are queued anew with each, and it is left if any comes too
    late. Then the block that is computed again at the least cost for a byte. The peak is computed
    anew after each choice. With a period, choices are those of one, made again in each.

    Args:
        target: Bytes.
        link: Where blocks are moved to.
        swaps, recomputes: What is allowed.
    """
    window = (0, len(trace)) if period is None else period.window
    duration = None if period is None else period.duration(trace)
    timeline = _Timeline(trace, window, duration)
    if not len(timeline.live):
        return Reached(target, 0, 0)
    live = timeline.live
    before = peak = int(live.max())
    at = window[0] + int(live.argmax())
    intervals = access_intervals(trace, period)
    movable = swap_candidates(trace, intervals, link, peak=at, window=window) if swaps else []
    movable = [c for c in movable if c.size >= LEAST_SHARE * before]
    droppable = (
        recompute_candidates(trace, intervals, least=max(1, int(LEAST_SHARE * before)))
        if recomputes
        else []
    )
    chosen: list[Candidate] = []
    again: list[Recompute] = []
    aways: list[Away] = []
    choices: list[Choice] = []
    tried_swaps: set[tuple[int, int]] = set()
    away: set[tuple[int, int]] = set()
    while peak > target:
        at = window[0] + int(live.argmax())
        best: tuple[Int64, Choice] | None = None
        for one in sorted(
            (c for c in movable if _key(c) not in tried_swaps | away and _over(c, at)),
            key=lambda c: -c.score,
        ):
            tried_swaps.add(_key(one))
            if any(_starves(one, drop) for drop in again):
                continue
            tried = queue([*chosen, one], link, duration)
            if tried is None:
                continue
            lower = timeline.without(tried, [*chosen, one], again)
            if _better(lower, live, at - window[0]):
                chosen.append(one)
                away.add(_key(one))
                aways = tried
                best = lower, _choice("swap", one, 0, int(lower.max()))
                break
        if best is None:
            for drop in droppable:
                if _key(drop) in away or not _over(drop, at):
                    continue
                others: list[Candidate | Recompute] = [*chosen, *again]
                if any(_starves(o, drop) for o in others) or any(_starves(drop, r) for r in again):
                    continue
                lower = timeline.without(aways, chosen, [*again, drop])
                if _better(lower, live, at - window[0]):
                    again.append(drop)
                    away.add(_key(drop))
                    best = lower, _choice("recompute", drop, drop.cost, int(lower.max()))
                    break
        if best is None:
            left = _why(trace, swaps, recomputes, int(LEAST_SHARE * before))
            return Reached(target, before, peak, choices, left)
        live, choice = best
        peak = choice.peak
        choices.append(choice)
    return Reached(target, before, peak, choices)


def _key(one: Candidate | Recompute) -> tuple[int, int]:
    """Return what tells intervals apart."""
    return one.instance, one.first


def _over(one: Candidate | Recompute, at: int) -> bool:
    """Return whether an event lies in an interval, which may wrap."""
    if one.second <= one.first:
        return one.first <= at or at < one.second
    return one.first <= at < one.second


def _starves(away: Candidate | Recompute, drop: Recompute) -> bool:
    """Return whether a block is away when another is computed from it."""
    return away.instance in drop.needs and _over(away, drop.second)


def _better(lower: Int64, live: Int64, place: int) -> bool:
    """Return whether less is alive where most was, and nowhere more than that."""
    return bool(lower[place] < live[place]) and int(lower.max()) <= int(live.max())


def _choice(
    how: Literal["swap", "recompute"], one: Candidate | Recompute, cost: int, peak: int
) -> Choice:
    return Choice(how, one.instance, one.first, one.second, one.size, cost, peak)


def _why(trace: Trace, swaps: bool, recomputes: bool, least: int) -> str:
    if swaps and not has_times(trace):
        return "the clock counts operations, so no copy can be timed; nothing else can be dropped"
    if not (swaps or recomputes):
        return "neither swapping nor recomputing is allowed"
    return (
        f"no other block of {least:,} bytes or more over the peak can be moved in time or computed "
        "again"
    )
