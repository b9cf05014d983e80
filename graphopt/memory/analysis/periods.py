"""The smallest exact period of a trace: what one iteration of a loop does to memory.

Two events are alike if operation, kind, size and dtype of their instances are, and, for weights,
if it is the same weight: the layers of a model do the same to memory too, but each has weights of
its own, which a second iteration of a loop uses again. After Li et al., "Pinpointing the Memory
Behaviors of DNN Training" (ISPASS 2021), who find that training repeats; they search by brute
force, here it is the Z-function (Gusfield, "Algorithms on Strings, Trees and Sequences",
section 1.3) around the middle of the trace (Main and Lorentz, "An O(n log n) Algorithm for Finding
All Repetitions in a String", 1984).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.memory.trace import Trace

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Period:
    """Events that repeat exactly.

    Attributes:
        events: How many events one period has.
        start, stop: The events in [start, stop) repeat; those before are the warm-up.
        begin: First event of the last whole period: where the trace marks an iteration, or else
            where fewest bytes are alive.
        same_sizes: Whether sizes repeat too; otherwise operations, kinds and dtypes alone do, as
            in a loop whose KV cache grows.
    """

    events: int
    start: int
    stop: int
    begin: int
    same_sizes: bool = True

    @property
    def repeats(self) -> int:
        """How many whole periods there are."""
        return (self.stop - self.start) // self.events

    @property
    def window(self) -> tuple[int, int]:
        """The last whole period: its first event, and the one behind its last."""
        return self.begin, self.begin + self.events

    def duration(self, trace: Trace) -> int:
        """Return the time of one period, in units of the trace's clock."""
        first, behind = self.window
        if behind < len(trace):
            return int(trace.time_ns[behind] - trace.time_ns[first])
        # The trace ends with it: what lies between two periods is that in front of it.
        return int(trace.time_ns[-1] - trace.time_ns[first - 1])


def find_period(trace: Trace, *, sizes: bool = True) -> Period | None:
    """Return the smallest exact period of a trace; None if it has none.

    A period repeats at least twice, and over more than half of the events; what comes before it is
    the warm-up, and what comes behind is left out as well. Takes time and memory in proportion to
    the number of events.

    Args:
        sizes: Whether the sizes of blocks count.
    """
    if len(trace.iteration_marks) == 1:
        return None
    keys = event_keys(trace, sizes=sizes)
    found = _smallest(keys)
    if found is None:
        return None
    events, start, stop = found
    return Period(events, start, stop, _begin(trace, events, start, stop), sizes)


def event_keys(trace: Trace, *, sizes: bool = True) -> list[int]:
    """Return a number for each event, equal where two events are alike."""
    instances = trace.instances
    same = ("weight", "optimizer", "kv") if sizes else ("weight", "optimizer")
    weights = np.array(
        [i.index + 1 if i.external and i.category in same else 0 for i in instances], np.int64
    )
    names = {name: place for place, name in enumerate(sorted({i.dtype for i in instances}))}
    per_instance = [weights, np.array([names[i.dtype] for i in instances])]
    if sizes:
        per_instance.append(trace.sizes)
    columns: list[npt.NDArray[Any]] = [trace.op, trace.kind]
    columns += [column.astype(np.int64)[trace.instance] for column in per_instance]
    key = np.zeros(len(trace), np.int64)
    for column in columns:
        values, place = np.unique(column, return_inverse=True)
        # Numbers stay below events times values, which int64 holds.
        key = np.unique(key * len(values) + place.reshape(-1), return_inverse=True)[1].reshape(-1)
    listed: list[int] = key.tolist()
    return listed


def z_function(keys: Sequence[int]) -> list[int]:
    """Return, for each place, how many values from there on equal those from the start on."""
    count = len(keys)
    z = [0] * count
    if count:
        z[0] = count
    left = right = 0
    for place in range(1, count):
        length = min(right - place, z[place - left]) if place < right else 0
        while place + length < count and keys[length] == keys[place + length]:
            length += 1
        z[place] = length
        if place + length > right:
            left, right = place, place + length
    return z


def _around(keys: list[int]) -> tuple[Int64, Int64]:
    """Return, for each distance p, how far the keys from the middle equal those p further on.

    The first array counts from the middle onwards, the second backwards from in front of it.
    """
    middle = len(keys) // 2
    onwards = np.array([*z_function(keys[middle:]), 0], np.int64)
    before, reverse = keys[:middle][::-1], keys[::-1]
    matched = np.array(z_function([*before, -1, *reverse])[middle + 1 :], np.int64)
    # Distance p compares what is in front of the middle with what is in front of middle + p.
    backwards = matched[: len(keys) - middle + 1][::-1]
    return onwards, backwards


def _smallest(keys: list[int]) -> tuple[int, int, int] | None:
    """Return the smallest period of more than half of the keys, and where it starts and stops."""
    count = len(keys)
    best: tuple[int, int, int] | None = None
    for mirrored in (False, True):
        # Whatever covers more than half holds the middle, and repeats there to one side.
        onwards, backwards = _around(keys[::-1] if mirrored else keys)
        middle = count // 2
        period = np.arange(len(onwards))
        length = period + onwards + backwards
        fits = (period > 0) & (length >= 2 * period) & (2 * length > count)
        if not fits.any():
            continue
        p = int(fits.argmax())
        start, stop = middle - int(backwards[p]), middle + p + int(onwards[p])
        if mirrored:
            start, stop = count - stop, count - start
        if best is None or (p, start - stop) < (best[0], best[1] - best[2]):
            best = (p, start, stop)
    return best


def _begin(trace: Trace, events: int, start: int, stop: int) -> int:
    """Return where the last whole period begins."""
    marks = [mark for mark in trace.iteration_marks if start <= mark < stop]
    if marks:
        first = marks[0]
    else:
        live = trace.live_bytes()
        # Behind the event where fewest bytes are alive the next one begins.
        first = start + (int(live[start : start + events].argmin()) + 1) % events
    return (
        first + max((stop - first) // events - 1, 0) * events
        if first + events <= stop
        else (stop - events)
    )
