"""A trace of memory in the JSON form that the Perfetto viewer and chrome://tracing open.

The form is the "Trace Event Format": complete slices (phase X), counters (C), instants (i) and
metadata (M), with times in microseconds. Slices of one thread may not overlap in part there, so
blocks are laid on lanes, a thread each; a category is a process.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.memory.analysis.summary import Summary
from graphopt.memory.trace import CATEGORIES, KIND_NAMES, READ, WRITE

COUNTERS = 1
"""Number of the process of the counters; categories follow."""

MOST_ACCESSES = 200_000
"""Reads and writes that become instants; of a longer trace none do, which its metadata say."""


def trace_events(summary: Summary) -> dict[str, Any]:
    """Return the trace as an object of the Trace Event Format.

    Times of a clock that counts operations are counts, shown as microseconds.
    """
    trace = summary.trace
    accesses = np.flatnonzero((trace.kind == READ) | (trace.kind == WRITE))
    with_accesses = len(accesses) <= MOST_ACCESSES
    lanes = _lanes(summary)
    events = [*_names(summary, lanes), *_slices(summary, lanes), *_counters(summary)]
    if with_accesses:
        events += _instants(summary, lanes, accesses.tolist())
    notes = list(trace.notes)
    if not with_accesses:
        notes.append(f"{len(accesses):,} reads and writes are left out: they are too many to open.")
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {
            "title": summary.title,
            "clock": trace.clock,
            "peak_bytes": str(summary.peak),
            "complete": str(trace.complete).lower(),
            "notes": " ".join(notes),
        },
    }


def write_perfetto(summary: Summary, path: str | Path) -> None:
    """Write the trace to a file that the Perfetto viewer opens."""
    Path(path).write_text(json.dumps(trace_events(summary), separators=(",", ":")), "utf-8")


def _process(category: str) -> int:
    return COUNTERS + 1 + CATEGORIES.index(category)  # type: ignore[arg-type]


def _micro(summary: Summary, event: int) -> float:
    trace = summary.trace
    return float(trace.time_ns[event] - trace.time_ns[0]) / _unit(summary)


def _unit(summary: Summary) -> float:
    return 1.0 if summary.trace.clock == "operation index" else 1e3


def _life(summary: Summary, index: int) -> tuple[float, float]:
    """Return when a block begins and ends, in microseconds."""
    instance = summary.trace.instances[index]
    last = len(summary.trace) - 1
    begin = 0.0 if instance.external else _micro(summary, instance.born)
    end = last if instance.died is None else instance.died
    return begin, _micro(summary, end) if last >= 0 else 0.0


def _lanes(summary: Summary) -> list[int]:
    """Return the lane of each block: the first of its category that is free by then."""
    lanes = [0] * len(summary.trace.instances)
    lives = [_life(summary, i) for i in range(len(lanes))]
    for category in CATEGORIES:
        own = [i.index for i in summary.trace.instances if i.category == category]
        busy: list[tuple[float, int]] = []
        free: list[int] = []
        used = 0
        for index in sorted(own, key=lambda i: lives[i]):
            while busy and busy[0][0] <= lives[index][0]:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if free:
                lane = heapq.heappop(free)
            else:
                used += 1
                lane = used
            lanes[index] = lane
            heapq.heappush(busy, (lives[index][1], lane))
    return lanes


def _names(summary: Summary, lanes: list[int]) -> Iterator[dict[str, Any]]:
    used = sorted({i.category for i in summary.trace.instances}, key=CATEGORIES.index)
    yield _named("process_name", COUNTERS, 0, "bytes alive")
    for category in used:
        yield _named("process_name", _process(category), 0, f"blocks: {category}")
    for process, lane in sorted(
        {(_process(i.category), lanes[i.index]) for i in summary.trace.instances}
    ):
        yield _named("thread_name", process, lane, f"lane {lane}")


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _slices(summary: Summary, lanes: list[int]) -> Iterator[dict[str, Any]]:
    for instance in summary.trace.instances:
        begin, end = _life(summary, instance.index)
        yield {
            "ph": "X",
            "name": summary.label(instance.index),
            "cat": instance.category,
            "pid": _process(instance.category),
            "tid": lanes[instance.index],
            "ts": begin,
            "dur": end - begin,
            "args": {
                "block": instance.index,
                "bytes": instance.size,
                "producer": instance.producer,
                "saved_for_backward": instance.saved,
                "released": instance.died is not None,
            },
        }


def _counters(summary: Summary) -> Iterator[dict[str, Any]]:
    trace = summary.trace
    if not len(trace):
        return
    total = trace.live_bytes()
    parts = trace.live_bytes_by_category()
    # Counters change where bytes do; the first says what was there before.
    changes = np.flatnonzero(np.diff(total, prepend=total[0] - 1))
    for event in changes.tolist():
        common = {"ph": "C", "pid": COUNTERS, "tid": 0, "ts": _micro(summary, event)}
        yield common | {"name": "bytes alive", "args": {"bytes": int(total[event])}}
        yield common | {
            "name": "by category",
            "args": {category: int(live[event]) for category, live in parts.items()},
        }


def _instants(summary: Summary, lanes: list[int], accesses: list[int]) -> Iterator[dict[str, Any]]:
    trace = summary.trace
    for event in accesses:
        instance = trace.instances[int(trace.instance[event])]
        yield {
            "ph": "i",
            "s": "t",
            "name": f"{KIND_NAMES[trace.kind[event]]} by {trace.op_names[int(trace.op[event])]}",
            "cat": "access",
            "pid": _process(instance.category),
            "tid": lanes[instance.index],
            "ts": _micro(summary, event),
        }
