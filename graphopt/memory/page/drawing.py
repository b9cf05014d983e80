"""What the page draws: blocks, curves and points, no more than a browser draws at once."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.memory.analysis.summary import Summary
from graphopt.memory.trace import CATEGORIES, Category, Trace

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

MOST_BLOCKS = 100_000
"""Blocks that are drawn; of more, those with most bytes times time."""

MOST_POINTS = 20_000
"""Intervals that are drawn as points."""

CURVE = 4_000
"""Places of a curve over time."""

STACKED: tuple[Category, ...] = (
    "weight", "optimizer", "kv", "gradient", "activation", "input", "workspace", "other",
)  # fmt: skip
"""Categories from the bottom to the top of a curve."""


@dataclass(frozen=True)
class Drawn:
    """What is drawn, as arrays, and what was left out.

    Attributes:
        data: For the page's script: numbers, texts, and arrays as base64 of little-endian values.
        left_out: A sentence on each thing of which only a part is drawn.
    """

    data: dict[str, Any]
    left_out: list[str]


def drawn(summary: Summary, offsets: Int64 | None = None) -> Drawn:
    """Return what the page draws of a summary.

    Args:
        offsets: Planned place of each instance in an arena, int64 [instances], -1 where it has
            none; without a plan, blocks are stacked in order of their allocation.
    """
    trace = summary.trace
    left_out: list[str] = []
    times = trace.time_ns.astype(np.float64) if len(trace) else np.zeros(1)
    start, end = float(times[0]), max(float(times[-1]), float(times[0]) + 1.0)
    data = {
        "clock": trace.clock,
        "start": 0.0,
        "end": end - start,
        "categories": list(CATEGORIES),
        "peak": summary.peak,
        "peakTime": float(times[summary.peak_event] - start),
        **_blocks(summary, offsets, times - start, end - start, left_out),
        **_curves(trace, times - start, end - start),
        **_intervals(summary, left_out),
    }
    return Drawn(data, left_out)


def packed(values: npt.ArrayLike, dtype: str) -> str:
    """Return values as base64 of little-endian numbers."""
    return base64.b64encode(np.ascontiguousarray(values, f"<{dtype}").tobytes()).decode("ascii")


def lives(trace: Trace, times: Float64, end: float) -> tuple[Float64, Float64]:
    """Return when each instance begins and ends, float64 [instances] each."""
    born = np.array([i.born for i in trace.instances], np.int64)
    died = np.array([-1 if i.died is None else i.died for i in trace.instances], np.int64)
    begin = np.where(trace.external, 0.0, times[born])
    return begin, np.where(died < 0, end, times[died])


def _blocks(
    summary: Summary, offsets: Int64 | None, times: Float64, end: float, left_out: list[str]
) -> dict[str, Any]:
    trace = summary.trace
    begin, stop = lives(trace, times, end)
    sizes = trace.sizes
    if offsets is None:
        offsets = _stacked(trace)
    shown = np.flatnonzero((sizes > 0) & (offsets >= 0))
    if len(shown) > MOST_BLOCKS:
        area = sizes[shown].astype(np.float64) * (stop - begin)[shown]
        kept = np.argsort(-area, kind="stable")[:MOST_BLOCKS]
        share = area[kept].sum() / max(area.sum(), 1.0)
        left_out.append(
            f"Of {len(shown):,} blocks, the {MOST_BLOCKS:,} with most bytes times time are drawn: "
            f"{share:.1%} of it."
        )
        shown = np.sort(shown[kept])
    categories = np.array([CATEGORIES.index(i.category) for i in trace.instances], np.uint8)
    # By category, so that colours change seldom while they are drawn.
    shown = shown[np.argsort(categories[shown], kind="stable")]
    labels: dict[str, int] = {}
    named = [labels.setdefault(summary.label(i), len(labels)) for i in shown.tolist()]
    return {
        "height": int((offsets[shown] + sizes[shown]).max()) if len(shown) else 1,
        "begin": packed(begin[shown], "f8"),
        "stop": packed(stop[shown], "f8"),
        "offset": packed(offsets[shown], "f8"),
        "size": packed(sizes[shown], "f8"),
        "category": packed(categories[shown], "u1"),
        "index": packed(shown, "u4"),
        "label": packed(named, "u4"),
        "labels": list(labels),
    }


def _stacked(trace: Trace) -> Int64:
    """Return offsets of blocks on top of each other, in order of allocation."""
    return np.cumsum(trace.sizes) - trace.sizes


def _curves(trace: Trace, times: Float64, end: float) -> dict[str, Any]:
    """Return bytes by category over time: at each place, where most were alive around it."""
    if not len(trace):
        return {"curveTime": packed([], "f8"), "curves": {}}
    total = trace.live_bytes()
    if len(trace) <= CURVE:
        chosen = np.arange(len(trace))
    else:
        slot = np.minimum((times / end * CURVE).astype(np.int64), CURVE - 1)
        # The event with most bytes of each slot, so that no peak is lost.
        order = np.lexsort((-total, slot))
        chosen = np.sort(order[np.unique(slot[order], return_index=True)[1]])
    by_category = trace.live_bytes_by_category()
    # What changes least lies at the bottom.
    curves = {
        category: packed(by_category[category][chosen], "f8")
        for category in STACKED
        if category in by_category
    }
    return {"curveTime": packed(times[chosen], "f8"), "curves": curves}


def _intervals(summary: Summary, left_out: list[str]) -> dict[str, Any]:
    found = summary.intervals
    gaps = np.sort(found.gap)
    ranks = np.unique(np.linspace(0, max(len(gaps) - 1, 0), 500).astype(np.int64))
    chosen = np.flatnonzero(found.size > 0)
    if len(chosen) > MOST_POINTS:
        score = found.size[chosen].astype(np.float64) * found.gap[chosen]
        largest = np.argsort(-score, kind="stable")[: MOST_POINTS // 2]
        rest = np.setdiff1d(np.arange(len(chosen)), largest)
        every = rest[:: -(-len(rest) // (MOST_POINTS // 2))]
        left_out.append(
            f"Of {len(chosen):,} intervals, {len(largest) + len(every):,} are drawn as points: "
            "those with most bytes times time, and others at even distances."
        )
        chosen = chosen[np.sort(np.concatenate([largest, every]))]
    fits = {(c.instance, c.first) for c in summary.swaps}
    keys = zip(found.instance[chosen].tolist(), found.first[chosen].tolist(), strict=True)
    labels: dict[str, int] = {}
    named = [labels.setdefault(summary.label(i), len(labels)) for i in found.instance[chosen]]
    link = summary.link
    return {
        "cdfGap": packed(gaps[ranks] if len(gaps) else [], "f8"),
        "cdfShare": packed((ranks + 1) / max(len(gaps), 1) if len(gaps) else [], "f8"),
        "pointGap": packed(found.gap[chosen], "f8"),
        "pointSize": packed(found.size[chosen], "f8"),
        "pointFits": packed([key in fits for key in keys], "u1"),
        "pointLabel": packed(named, "u4"),
        "pointLabels": list(labels),
        "link": [link.out_bytes, link.in_bytes, link.out_ns, link.in_ns],
    }
