"""The history that torch's allocator for GPUs keeps, joined with a trace.

Operators show tensors alone. What kernels ask for inside, workspaces of libraries and temporary
buffers, is seen by the allocator: its history has an entry for every block that it gives and takes
back, with address and time. An entry belongs to the instance that had its address and size at that
time; those that belong to none become instances of category "workspace".
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graphopt.memory.trace import FREE, MALLOC, Instance, Int64, Trace

ENTRIES = 2_000_000
"""How many entries torch keeps; older ones are dropped."""

_SLACK_NS = 200_000
"""By how much the clock of the allocator may be behind the host's: it is an approximate one."""


@dataclass(frozen=True, slots=True)
class _Given:
    """A block that the allocator gave.

    Attributes:
        address, size: Where, and the bytes that were asked for.
        given: When, Unix time in nanoseconds; None for before the history.
        taken: When it was taken back; None for not at all.
    """

    address: int
    size: int
    given: int | None
    taken: int | None


class AllocatorHistory:
    """Keeps the history of a GPU's allocator while it is entered.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        self._device = index
        self._before: list[dict[str, Any]] = []
        self._snapshot: dict[str, Any] = {}

    def __enter__(self) -> AllocatorHistory:
        torch.cuda.synchronize(self._device)
        self._before = torch.cuda.memory._snapshot()["segments"]
        torch.cuda.memory._record_memory_history("all", context=None, max_entries=ENTRIES)
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize(self._device)
        self._snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(None)

    def join(self, trace: Trace, addresses: Sequence[tuple[int, int]], host_times: Int64) -> Trace:
        """Return a trace with the instances that the allocator alone has seen.

        Args:
            addresses: Of each instance the address and the Unix time at which it was seen.
            host_times: Unix time of each event in nanoseconds.
        """
        segments = [s for s in self._before if s["device"] == self._device]
        entries = self._snapshot["device_traces"][self._device]
        joined = join(trace, addresses, host_times, segments, entries, f"cuda:{self._device}")
        if len(entries) >= ENTRIES:
            joined.notes.append(f"The allocator keeps {ENTRIES} entries; older ones are missing.")
        return joined


def join(
    trace: Trace,
    addresses: Sequence[tuple[int, int]],
    host_times: Int64,
    segments: Sequence[Mapping[str, Any]],
    entries: Sequence[Mapping[str, Any]],
    device: str,
) -> Trace:
    """Return a trace with instances for the blocks of an allocator that no tensor of it had.

    Args:
        addresses, host_times: See `AllocatorHistory.join`.
        segments: `torch.cuda.memory._snapshot()["segments"]` before the trace began.
        entries: Its `device_traces` behind the end, of one device.
        device: What the trace calls that device.
    """
    given = _given(segments, entries)
    unseen = _unmatched(given, trace, addresses, device)
    begun = int(host_times[0]) if len(host_times) else 0
    starts = _call_starts(trace)
    rows: list[tuple[int, int, int]] = []  # event in front of which it lies, kind, instance
    instances = list(trace.instances)
    for block in unseen:
        index = len(instances)
        since = -1 if block.given is None else block.given
        before = since < begun
        place = 0 if before else int(np.searchsorted(host_times, since, "right"))
        call = int(trace.call[place - 1]) if place else -1
        if not before and place < len(trace) and _inside(block, starts, host_times, call + 1):
            call += 1
        producer = trace.op_names[trace.op[starts[call]]] if 0 <= call < len(starts) else ""
        instances.append(
            Instance(
                index, block.size, "uint8", (block.size,), device, "workspace",
                "" if before else producer, 0, None, external=before,
            )
        )  # fmt: skip
        if not before:
            rows.append((place, MALLOC, index))
        if block.taken is not None and block.taken >= begun:
            end = int(np.searchsorted(host_times, block.taken, "right"))
            rows.append((max(end, place), FREE, index))
    return _with_rows(trace, instances, sorted(rows, key=lambda row: row[0]))


def _given(
    segments: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]
) -> list[_Given]:
    """Return every block that was in use at some time of the history."""
    open_blocks: dict[int, tuple[int, int | None]] = {}
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                size = block.get("requested_size", block["size"])
                open_blocks[block.get("address", address)] = (size, None)
            address += block["size"]
    found = []
    for entry in entries:
        now = entry["time_us"] * 1000
        if entry["action"] == "alloc":
            open_blocks[entry["addr"]] = (entry["size"], now)
        elif entry["action"] == "free_completed" and entry["addr"] in open_blocks:
            size, since = open_blocks.pop(entry["addr"])
            found.append(_Given(entry["addr"], size, since, now))
    found += [_Given(where, size, since, None) for where, (size, since) in open_blocks.items()]
    return sorted(found, key=lambda block: block.given or 0)


def _unmatched(
    given: Sequence[_Given], trace: Trace, addresses: Sequence[tuple[int, int]], device: str
) -> list[_Given]:
    """Return the blocks that are no instance's."""
    by_place: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, block in enumerate(given):
        by_place.setdefault((block.address, block.size), []).append((block.given or 0, number))
    taken: set[int] = set()
    for instance, (address, seen) in zip(trace.instances, addresses, strict=True):
        blocks = by_place.get((address, instance.size), [])
        # The last one that was given before the instance was seen.
        place = bisect.bisect_right(blocks, (seen + _SLACK_NS, len(given)))
        while place and blocks[place - 1][1] in taken:
            place -= 1
        if place and instance.device == device:
            taken.add(blocks[place - 1][1])
    return [block for number, block in enumerate(given) if number not in taken]


def _call_starts(trace: Trace) -> Int64:
    """Return the first event of each call."""
    calls = trace.call[trace.call >= 0]
    first: Int64 = np.searchsorted(trace.call, np.arange(calls.max() + 1 if len(calls) else 0))
    return first


def _inside(block: _Given, starts: Int64, host_times: Int64, call: int) -> bool:
    """Return whether a block was given between the beginning and the end of a call."""
    if call >= len(starts):
        return False
    end = int(starts[call + 1]) if call + 1 < len(starts) else len(host_times)
    begun, ended = host_times[starts[call]], host_times[end - 1]
    return block.given is not None and begun <= block.given <= ended


def _with_rows(
    trace: Trace, instances: list[Instance], rows: Sequence[tuple[int, int, int]]
) -> Trace:
    """Return a trace with events put in."""
    places = np.array([place for place, _, _ in rows], np.int64)
    kinds = np.array([kind for _, kind, _ in rows], np.uint8)
    which = np.array([index for _, _, index in rows], np.int32)

    def copied(column: Any, first: int) -> Any:
        # What is put in takes the operation and the time of the event in front of it.
        values = column[places - 1] if len(column) else np.zeros(len(places), column.dtype)
        return np.insert(column, places, np.where(places > 0, values, first))

    kind = np.insert(trace.kind, places, kinds)
    instance = np.insert(trace.instance, places, which)
    born = np.zeros(len(instances), np.int64)
    died = np.full(len(instances), -1, np.int64)
    for what, found in ((MALLOC, born), (FREE, died)):
        events = np.flatnonzero(kind == what)
        found[instance[events]] = events
    return dataclasses.replace(
        trace,
        instances=[
            dataclasses.replace(i, born=int(b), died=int(d) if d >= 0 else None)
            for i, b, d in zip(instances, born, died, strict=True)
        ],
        kind=kind,
        instance=instance,
        op=copied(trace.op, int(trace.op[0]) if len(trace) else 0),
        call=copied(trace.call, -1),
        time_ns=copied(trace.time_ns, 0),
        iteration_marks=[
            mark + int(np.searchsorted(places, mark, "left")) for mark in trace.iteration_marks
        ],
    )
