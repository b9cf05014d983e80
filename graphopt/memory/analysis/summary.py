"""All that is said of a trace, in one place: what the table, the page and the JSON show."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from graphopt.memory.analysis.fragmentation import Fragmentation
from graphopt.memory.analysis.intervals import Intervals, access_intervals
from graphopt.memory.analysis.kinds import (
    Kind,
    bytes_by_category,
    bytes_by_kind,
    disagreements,
)
from graphopt.memory.analysis.link import Link
from graphopt.memory.analysis.periods import Period, find_period
from graphopt.memory.analysis.recompute import Recompute, recompute_candidates
from graphopt.memory.analysis.swap import Candidate, has_times, swap_candidates
from graphopt.memory.analysis.target import Reached, reach_target
from graphopt.memory.trace import Category, Trace

ALIGNMENT = 512
"""Bytes to a multiple of which torch's CUDA allocator rounds a block up."""

SHORT_NS = 25_000
"""The published study finds nine tenths of the intervals below this many nanoseconds."""

SHOWN = 10
"""Candidates that are listed."""


@dataclass(frozen=True, eq=False)
class Summary:
    """What is said of a trace.

    Attributes:
        trace: What it is said of.
        title: What ran.
        peak: The most bytes alive at once, sizes as asked for.
        peak_event: The first event after which that many are.
        rounded_peak: The same with every size rounded up as torch's CUDA allocator does it: no
            plan of offsets can do with less.
        by_category, by_kind: Bytes at the peak, by what they are for, and by data flow.
        mismatches: Instances whose data flow is not what their category expects.
        period: The smallest exact period; None if there is none.
        grows: The period of operations whose sizes change; None if there is none, or an exact one.
        intervals: Of one period, also of one that grows, or of the whole trace.
        link: Where blocks could wait.
        swaps: Intervals whose block can be moved away in time, the best first.
        recomputes: Intervals whose block can be computed again, the cheapest first.
        reached: What choices make of the peak; None if no target was given.
        planned: Bytes of the arena that a plan of offsets needs; None if none was made.
        allocator: What a real allocator held; None if none was seen.
        facts: What the run was of, by name; `batch` and `seq` are numbers.
    """

    trace: Trace
    title: str
    peak: int
    peak_event: int
    rounded_peak: int
    by_category: dict[Category, int]
    by_kind: dict[Kind, int]
    mismatches: dict[tuple[Category, Kind], int]
    period: Period | None
    grows: Period | None
    intervals: Intervals
    link: Link
    swaps: list[Candidate]
    recomputes: list[Recompute]
    reached: Reached | None = None
    planned: int | None = None
    allocator: Fragmentation | None = None
    facts: dict[str, str | int] = field(default_factory=dict)

    @property
    def said(self) -> dict[str, str]:
        """The facts as words: sizes with what they are of."""
        words = {"batch": "batch {:,}", "seq": "{:,} tokens"}
        return {key: words.get(key, "{}").format(value) for key, value in self.facts.items()}

    def label(self, instance: int) -> str:
        """Return what a block is called: its name, or the operation that made it and its shape."""
        block = self.trace.instances[instance]
        shape = "x".join(map(str, block.shape))
        return f"{block.name or block.producer or 'made outside'} {block.dtype}[{shape}]"

    def time(self, amount: float) -> str:
        """Return a time of the trace's clock as text, or a number of operations."""
        if not has_times(self.trace):
            return f"{amount:.0f} ops"
        for unit, factor in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
            if amount >= factor:
                return f"{amount / factor:.3g} {unit}"
        return f"{amount:.0f} ns"

    def period_sentence(self) -> str:
        """Return what is said about the period."""
        if self.period is not None:
            p = self.period
            lasts = self.time(p.duration(self.trace))
            return f"{p.events:,} events, {p.repeats} times, {lasts} each; warm-up {p.start:,}"
        if self.grows is not None:
            return (
                f"{self.grows.events:,} events of the same operations, {self.grows.repeats} times, "
                "but sizes change from one to the next: no exact period"
            )
        return "none"

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `--json`."""
        trace, timed = self.trace, has_times(self.trace)
        period = None
        if self.period is not None:
            period = asdict(self.period) | {
                "repeats": self.period.repeats,
                "duration": self.period.duration(trace),
            }
        short = self.intervals.share_below(SHORT_NS) if timed else None
        quantiles = self.intervals.quantiles()
        return {
            "title": self.title,
            **self.facts,
            "clock": trace.clock,
            "complete": trace.complete,
            "notes": list(trace.notes),
            "events": len(trace),
            "blocks": len(trace.instances),
            "iterations": len(trace.iteration_marks),
            "peak_bytes": self.peak,
            "peak_event": self.peak_event,
            "peak_operation": self.peak_operation(),
            "rounded_peak_bytes": self.rounded_peak,
            "planned_bytes": self.planned,
            "allocator": None if self.allocator is None else self.allocator.to_json(),
            "by_category": self.by_category,
            "by_kind": self.by_kind,
            "mismatches": [
                {"category": category, "kind": kind, "blocks": count}
                for (category, kind), count in self.mismatches.items()
            ],
            "period": period,
            "growing_period": None if self.grows is None else asdict(self.grows),
            "intervals": {
                "count": len(self.intervals),
                "quantiles": dict(zip(("50%", "90%", "99%", "100%"), quantiles, strict=True)),
                "share_below_25_us": short,
            },
            "link": asdict(self.link),
            "swap_candidates": len(self.swaps),
            "swap": [asdict(c) | {"label": self.label(c.instance)} for c in self.swaps[:SHOWN]],
            "recompute_candidates": len(self.recomputes),
            "recompute": [
                asdict(r) | {"label": self.label(r.instance), "needs": sorted(r.needs)}
                for r in self.recomputes[:SHOWN]
            ],
            "target": None if self.reached is None else asdict(self.reached),
        }

    def peak_operation(self) -> str:
        """Return the operation at whose event most bytes are alive."""
        if not len(self.trace):
            return ""
        return self.trace.op_names[int(self.trace.op[self.peak_event])]


def summarise(
    trace: Trace,
    title: str,
    link: Link,
    *,
    target: int | None = None,
    planned: int | None = None,
    allocator: Fragmentation | None = None,
    facts: dict[str, str | int] | None = None,
) -> Summary:
    """Return what is said of a trace; see `Summary`.

    Args:
        link: Where blocks could wait.
        target: Bytes that the peak should get down to; None to look for no choices.
    """
    peak = trace.peak()
    period = find_period(trace)
    grows = None if period is not None else find_period(trace, sizes=False)
    repeats = period or grows
    intervals = access_intervals(trace, repeats)
    window = (0, len(trace)) if repeats is None else repeats.window
    top = peak.event
    if repeats is not None:
        top = window[0] + int(np.argmax(trace.live_bytes()[slice(*window)]))
    return Summary(
        trace,
        title,
        peak.bytes,
        peak.event,
        trace.peak(alignment=ALIGNMENT).bytes,
        bytes_by_category(trace, peak.event),
        bytes_by_kind(trace, peak.event),
        disagreements(trace),
        period,
        grows,
        intervals,
        link,
        swap_candidates(trace, intervals, link, peak=top, window=window),
        recompute_candidates(trace, intervals),
        None if target is None else reach_target(trace, target, link, repeats),
        planned,
        allocator,
        facts or {},
    )
