"""Access-time intervals: how long a block lies untouched between two accesses.

An access is a read or a write. An interval lies within the life of one instance: what another
block does with the same address later is no part of it. (Intervals by address, as the scripts of
the published study form them, span a release and the next allocation.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphopt.memory.analysis.periods import Period
from graphopt.memory.trace import READ, WRITE, Trace

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Intervals:
    """Intervals as columns; gaps are in units of the trace's clock.

    Attributes:
        instance: int64 [n].
        first, second: int64 [n], the events of the two accesses; of an interval that wraps, the
            second comes before the first, in the next period.
        gap: int64 [n], the time between them.
        size: int64 [n], bytes of the block.
        wraps: bool [n], from the last access in a period to the first in the next.
    """

    instance: Int64
    first: Int64
    second: Int64
    gap: Int64
    size: Int64
    wraps: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.gap)

    def share_below(self, gap: int) -> float:
        """Return the share of intervals that are no longer than `gap`; 0.0 if there are none."""
        return float((self.gap <= gap).mean()) if len(self) else 0.0

    def quantiles(self, shares: tuple[float, ...] = (0.5, 0.9, 0.99, 1.0)) -> list[int]:
        """Return the gaps below which these shares of the intervals lie."""
        if not len(self):
            return [0] * len(shares)
        return [int(v) for v in np.quantile(self.gap, shares, method="inverted_cdf")]


def access_intervals(trace: Trace, period: Period | None = None) -> Intervals:
    """Return the intervals between successive accesses of one instance.

    Args:
        period: With one, intervals are those of its last whole window, and a block that lives
            through all of it has one more, from its last access to its first in the next period.
    """
    begin, stop = (0, len(trace)) if period is None else period.window
    kind = trace.kind[begin:stop]
    events = begin + np.flatnonzero((kind == READ) | (kind == WRITE))
    owner = trace.instance[events].astype(np.int64)
    order = np.argsort(owner, kind="stable")
    events, owner = events[order], owner[order]
    new = np.ones(len(owner), bool)
    new[1:] = owner[1:] != owner[:-1]
    inner = np.flatnonzero(~new)
    first, second, of = events[inner - 1], events[inner], owner[inner]
    gap = trace.time_ns[second] - trace.time_ns[first]
    wraps = np.zeros(len(inner), bool)
    if period is not None and len(owner):
        heads = np.flatnonzero(new)
        tails = np.append(heads[1:], len(owner)) - 1
        through = lives_through(trace, begin, stop)[owner[heads]]
        heads, tails = heads[through], tails[through]
        untouched = period.duration(trace) - (
            trace.time_ns[events[tails]] - trace.time_ns[events[heads]]
        )
        first, second = np.append(first, events[tails]), np.append(second, events[heads])
        of, gap = np.append(of, owner[heads]), np.append(gap, untouched)
        wraps = np.append(wraps, np.ones(len(heads), bool))
    return Intervals(of, first, second, gap, trace.sizes[of], wraps)


def lives_through(trace: Trace, begin: int, stop: int) -> npt.NDArray[np.bool_]:
    """Return which instances are alive from event `begin` to event `stop`, bool [instances]."""
    return trace.where(
        lambda i: (i.external or i.born < begin) and (i.died is None or i.died >= stop)
    )
