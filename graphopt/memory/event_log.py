"""The events of a run as they are appended, and the trace that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from graphopt.memory.trace import FREE, MALLOC, WRITE, Category, Clock, Instance, Int64, Trace

OUTSIDE = -1
"""The operation of what no operation made."""


@dataclass(slots=True)
class Row:
    """What becomes an `Instance`."""

    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device
    category: Category
    producer: int
    saved: bool = False
    name: str = ""


@dataclass(slots=True)
class EventLog:
    """What a recorder appends to, in plain lists, since that is the fastest.

    Attributes:
        clock: What times are to be.
        rows: The instances.
        codes: Of each event 4 * instance + kind.
        times: Of each event the host's nanoseconds.
        call_starts, call_ops: Of each call of an operation its first event, and the operation.
        spans: Of each call two events of a GPU, or, as a cost model has it, its nanoseconds.
        marks: The event in front of which each iteration begins.
        written: Instances that were written in place.
    """

    clock: Clock
    rows: list[Row] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    call_starts: list[int] = field(default_factory=list)
    call_ops: list[int] = field(default_factory=list)
    spans: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    written: set[int] = field(default_factory=set)

    @property
    def host_times(self) -> Int64:
        """The host's time of each event: what is let go of meanwhile may have come in between."""
        return np.maximum.accumulate(np.array(self.times, np.int64))

    def trace(self, names: Sequence[str], notes: Sequence[str], complete: bool) -> Trace:
        """Return what was appended as a trace, by the names of the operations."""
        codes = np.array(self.codes, np.int64)
        kind, instance = (codes & 3).astype(np.uint8), (codes >> 2).astype(np.int32)
        place = np.arange(len(codes))
        call = np.searchsorted(np.array(self.call_starts, np.int64), place, "right") - 1
        ops = np.array([*self.call_ops, len(names)], np.int32)  # call -1 has the last
        born, died = np.zeros(len(self.rows), np.int64), np.full(len(self.rows), -1, np.int64)
        external = np.ones(len(self.rows), bool)
        for what, found in ((MALLOC, born), (FREE, died)):
            found[instance[kind == what]] = place[kind == what]
        external[instance[kind == MALLOC]] = False
        devices = {device: str(device) for device in {row.device for row in self.rows}}
        return Trace(
            instances=[
                Instance(
                    index=index,
                    size=row.size,
                    dtype=str(row.dtype).removeprefix("torch."),
                    shape=row.shape,
                    device=devices[row.device],
                    category=self._category(index, bool(external[index])),
                    producer=names[row.producer] if row.producer != OUTSIDE else "",
                    born=int(born[index]),
                    died=int(died[index]) if died[index] >= 0 else None,
                    external=bool(external[index]),
                    saved=row.saved,
                    name=row.name,
                )
                for index, row in enumerate(self.rows)
            ],
            kind=kind,
            instance=instance,
            op=ops[call],
            call=call.astype(np.int32),
            time_ns=self._time(kind, call),
            clock=self.clock,
            op_names=[*names, "(before the first operation)"],
            notes=list(notes),
            complete=complete,
            iteration_marks=list(self.marks),
        )

    def _category(self, index: int, external: bool) -> Category:
        """Return what an instance holds: what existed before and is written is no input."""
        category = self.rows[index].category
        return "weight" if external and category == "input" and index in self.written else category

    def _time(self, kind: npt.NDArray[Any], call: npt.NDArray[Any]) -> Int64:
        """Return the time of each event by the clock."""
        if self.clock == "host":
            times = self.host_times
            return times - times[0] if len(times) else times
        if self.clock == "operation index":
            return np.maximum(call, 0).astype(np.int64)
        late = (kind == WRITE) | (kind == FREE)
        if self.clock == "cost model":
            ends = np.cumsum([0.0, *self.spans])
        else:
            torch.cuda.synchronize()
            spans = [
                [self.spans[0][0].elapsed_time(event) * 1e6 for event in span]
                for span in self.spans
            ]
            both = np.array([*spans, [0.0, 0.0]])  # the last is that of a call before the first
            begins, stops = both.T
            found = np.where(late, stops[call], begins[call])
            return np.maximum.accumulate(found.astype(np.int64))
        found = np.where(call < 0, 0.0, ends[np.where(late, call + 1, call)])
        return np.maximum.accumulate(found.astype(np.int64))
