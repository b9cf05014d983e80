"""Blocks that could wait on the host: the test of one, and the queue of several.

A block is worth moving to the host and back within an interval if the copies fit into it:
gap >= S / out + latency out + S / in + latency in (Li et al., ISPASS 2021, with the latencies that
their own fit of copies has). Copies wait for each other: there is one channel a direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.memory.analysis.intervals import Intervals
from graphopt.memory.analysis.link import Link
from graphopt.memory.trace import Trace


@dataclass(frozen=True)
class Candidate:
    """A block and an interval in which it could wait on the host.

    Attributes:
        instance: Index of the instance.
        first, second: Events of the accesses between which it waits.
        ready, due: Times of these, in nanoseconds; of an interval that wraps, `due` lies in the
            next period.
        size: Bytes.
        trip: Nanoseconds of both copies.
        over_peak: Whether the interval contains the event at which most bytes are alive.
    """

    instance: int
    first: int
    second: int
    ready: int
    due: int
    size: int
    trip: float
    over_peak: bool

    @property
    def gap(self) -> int:
        """Nanoseconds of the interval."""
        return self.due - self.ready

    @property
    def score(self) -> float:
        """Bytes times the time that they could be away."""
        return self.size * max(self.gap - self.trip, 0.0)


@dataclass(frozen=True)
class Away:
    """When a block is away: from the end of its copy to the host to the start of that back."""

    instance: int
    start: float
    stop: float


def has_times(trace: Trace) -> bool:
    """Return whether the clock of a trace tells time: an operation index does not."""
    return trace.clock != "operation index"


def swap_candidates(
    trace: Trace, intervals: Intervals, link: Link, *, peak: int, window: tuple[int, int]
) -> list[Candidate]:
    """Return intervals whose block gets to the host and back in time, the best first.

    Those over the peak come first, and of these the ones with most bytes times time away.

    Args:
        peak: The event at which most bytes are alive.
        window: The events that are looked at, [first, behind the last).
    """
    if not has_times(trace):
        return []
    trips = intervals.size / link.out_bytes * 1e9 + intervals.size / link.in_bytes * 1e9
    trips = trips + link.out_ns + link.in_ns
    fits = np.flatnonzero((intervals.size > 0) & (intervals.gap >= trips))
    found = []
    for place in fits.tolist():
        first, second = int(intervals.first[place]), int(intervals.second[place])
        wraps = bool(intervals.wraps[place])
        ready = int(trace.time_ns[first])
        found.append(
            Candidate(
                int(intervals.instance[place]),
                first,
                second,
                ready,
                ready + int(intervals.gap[place]),
                int(intervals.size[place]),
                float(trips[place]),
                # An interval that wraps covers both ends of the window.
                (first <= peak or peak < second) if wraps else first <= peak < second,
            )
        )
    return sorted(found, key=lambda c: (not c.over_peak, -c.score, c.first))


def queue(
    candidates: Sequence[Candidate], link: Link, duration: float | None = None
) -> list[Away] | None:
    """Return when each block is away if copies wait for each other; None if one comes too late.

    Copies to the host run in the order in which blocks are ready, each as soon as it can. Copies
    back run in the order in which blocks are due, each as late as it can. No block is away until
    its own copy out has ended.

    Args:
        duration: Of a period, in nanoseconds, if all of this happens again in each; then what is
            left of one period's copies delays the next one's.
    """
    rounds = 1 if duration is None else 2
    every = duration or 0.0
    if duration is not None and (
        sum(link.out_time(c.size) for c in candidates) > duration
        or sum(link.in_time(c.size) for c in candidates) > duration
    ):
        return None
    out_end = [0.0] * len(candidates)
    in_start = [0.0] * len(candidates)
    # With a period, the second round is the steady state: a queue that empties within a period
    # carries nothing further than into the next.
    free = float("-inf")
    for turn in range(rounds):
        for place in sorted(range(len(candidates)), key=lambda n: candidates[n].ready):
            one = candidates[place]
            free = max(free, one.ready + turn * every) + link.out_time(one.size)
            out_end[place] = free - turn * every
    busy = float("inf")
    for turn in range(rounds):
        for place in sorted(range(len(candidates)), key=lambda n: -candidates[n].due):
            one = candidates[place]
            busy = min(busy, one.due - turn * every) - link.in_time(one.size)
            in_start[place] = busy + turn * every
    if any(start < end for end, start in zip(out_end, in_start, strict=True)):
        return None
    return [
        Away(c.instance, end, start)
        for c, end, start in zip(candidates, out_end, in_start, strict=True)
    ]
