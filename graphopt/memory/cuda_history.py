"""The history that torch's allocator for GPUs keeps, joined with a trace.

Operators show tensors alone. What kernels ask for inside, workspaces of libraries and temporary
buffers, is seen by the allocator: its history has an entry for every block that it gives and takes
back, with address and time. An entry belongs to the instance that had its address at that time;
those that belong to none become instances of category "workspace".
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graphopt.memory.trace import FREE, MALLOC, Instance, Int64, Trace

ENTRIES = 2_000_000
"""How many entries torch keeps; older ones are dropped."""

_LEAD_NS = 20_000
_MOST_LEAD_NS = 1_000_000
"""How long before a tensor is seen its memory is given: about, and at most where the clocks agree.
The allocator's is an approximate one, and is set by tensors whose address is given once."""


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

    def peak(self) -> int:
        """Return the most bytes that were asked for and in use at once."""
        return history_peak(*self._here())

    def _here(self) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
        segments: list[Mapping[str, Any]] = list(self._before)
        here = [segment for segment in segments if segment["device"] == self._device]
        return here, self._snapshot["device_traces"][self._device]

    def join(self, trace: Trace, addresses: Sequence[tuple[int, int]], host_times: Int64) -> Trace:
        """Return a trace with the instances that the allocator alone has seen.

        Args:
            addresses: Of each instance the address and the Unix time at which it was seen.
            host_times: Unix time of each event in nanoseconds.
        """
        segments, entries = self._here()
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
    given = _with_host_clock(_given(segments, entries), trace, addresses)
    seen = set(_matches(given, trace, addresses, device).values())
    unseen = [block for number, block in enumerate(given) if number not in seen]
    begun = int(host_times[0]) if len(host_times) else 0
    starts = _call_starts(trace)
    # The event in front of which it lies, its time, kind and instance.
    rows: list[tuple[int, int, int, int]] = []
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
            rows.append((place, since, MALLOC, index))
        if block.taken is not None and block.taken >= begun:
            end = int(np.searchsorted(host_times, block.taken, "right"))
            rows.append((max(end, place), block.taken, FREE, index))
    return _with_rows(trace, instances, sorted(rows))


def history_peak(
    segments: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]
) -> int:
    """Return the most bytes in use at once, as asked for, by a history; see `join`."""
    live: dict[int, int] = {}
    for segment in segments:
        live.update(_in_use(segment))
    now = most = sum(live.values())
    for entry in entries:
        if entry["action"] == "alloc":
            live[entry["addr"]] = entry["size"]
            now += entry["size"]
            most = max(most, now)
        elif entry["action"] == "free_completed":
            now -= live.pop(entry["addr"], 0)
    return most


def order_errors(
    trace: Trace,
    addresses: Sequence[tuple[int, int]],
    segments: Sequence[Mapping[str, Any]],
    entries: Sequence[Mapping[str, Any]],
    device: str,
) -> tuple[int, int]:
    """Return how many instances are in a history, and how many of those are out of its order.

    Args: see `join`. The trace is the one that was not joined.
    """
    given = _with_host_clock(_given(segments, entries), trace, addresses)
    times = [
        given[number].given
        for index, number in sorted(_matches(given, trace, addresses, device).items())
        if not trace.instances[index].external
    ]
    known = [time for time in times if time is not None]
    return len(known), int((np.diff(np.array(known, np.int64)) < 0).sum())


def _in_use(segment: Mapping[str, Any]) -> dict[int, int]:
    """Return the blocks of a segment that are in use, by address, as what was asked for."""
    found, address = {}, segment["address"]
    for block in segment["blocks"]:
        if block["state"] == "active_allocated":
            found[address] = block.get("requested_size", block["size"])
        address += block["size"]
    return found


def _given(
    segments: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]
) -> list[_Given]:
    """Return every block that was in use at some time of the history."""
    open_blocks: dict[int, tuple[int, int | None]] = {}
    for segment in segments:
        open_blocks.update({where: (size, None) for where, size in _in_use(segment).items()})
    found = []
    for entry in entries:
        now = entry["time_us"] * 1000
        if entry["action"] == "alloc":
            open_blocks[entry["addr"]] = (entry["size"], now)
        elif entry["action"] == "free_completed" and entry["addr"] in open_blocks:
            size, since = open_blocks.pop(entry["addr"])
            found.append(_Given(entry["addr"], size, since, now))
    found += [_Given(where, size, since, None) for where, (size, since) in open_blocks.items()]
    return sorted(found, key=lambda block: (block.given is not None, block.given or 0))


def _matches(
    given: Sequence[_Given], trace: Trace, addresses: Sequence[tuple[int, int]], device: str
) -> dict[int, int]:
    """Return the number of each instance's block among those that were given."""
    at_address: dict[int, list[tuple[int, int]]] = {}
    for number, block in enumerate(given):
        at_address.setdefault(block.address, []).append((block.given or 0, number))
    here = [
        (instance, *where)
        for instance, where in zip(trace.instances, addresses, strict=True)
        if instance.device == device and instance.size
    ]
    found: dict[int, int] = {}
    taken: set[int] = set()
    for instance, address, seen in here:
        blocks = at_address.get(address, [])
        # The last one that was given before the instance was seen.
        place = bisect.bisect_right(blocks, (seen, len(given)))
        while place and blocks[place - 1][1] in taken:
            place -= 1
        if place and given[blocks[place - 1][1]].size >= instance.size:
            found[instance.index] = blocks[place - 1][1]
            taken.add(blocks[place - 1][1])
    return found


def _with_host_clock(
    given: Sequence[_Given], trace: Trace, addresses: Sequence[tuple[int, int]]
) -> list[_Given]:
    """Return blocks with times of the host's clock."""
    once: dict[int, int | None] = {}
    for block in given:
        if block.given is not None:
            once[block.address] = None if block.address in once else block.given
    ahead = []
    uses = Counter(address for address, _ in addresses)
    for instance, (address, seen) in zip(trace.instances, addresses, strict=True):
        since = once.get(address)
        if since is not None and uses[address] == 1 and not instance.external:
            ahead.append(since - seen)
    middle = int(np.median(ahead)) if ahead else 0
    if -_MOST_LEAD_NS <= middle <= 0:
        return list(given)
    shift = middle + _LEAD_NS
    return [
        dataclasses.replace(
            block,
            given=None if block.given is None else block.given - shift,
            taken=None if block.taken is None else block.taken - shift,
        )
        for block in given
    ]


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
    trace: Trace, instances: list[Instance], rows: Sequence[tuple[int, int, int, int]]
) -> Trace:
    """Return a trace with events put in."""
    places = np.array([place for place, _, _, _ in rows], np.int64)
    kinds = np.array([kind for _, _, kind, _ in rows], np.uint8)
    which = np.array([index for _, _, _, index in rows], np.int32)

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
