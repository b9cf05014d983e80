"""What happened to memory: the events of storage instances, as columns.

A storage instance is one storage from its allocation to its release. Memory that is used again
after a release belongs to another instance, so that no interval of an instance spans a reuse.

A trace has one row an event: an instance was allocated, released, read or written. Columns are
numpy arrays, so that a million events are looked through in seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pydantic

from graphopt.errors import SourceError
from graphopt.support.inputs import Schema, Size, parse, read_json, shown_path

MALLOC, FREE, READ, WRITE = range(4)
"""Kinds of events."""

KIND_NAMES = ("malloc", "free", "read", "write")

Category = Literal[
    "input", "weight", "activation", "gradient", "optimizer", "kv", "workspace", "other"
]
CATEGORIES: tuple[Category, ...] = get_args(Category)

Clock = Literal["host", "cuda events", "operation index", "cost model"]
"""What `Trace.time_ns` was read from. An operation index is no time: one operation, one unit."""

VERSION = 1
"""Of the file's form."""

MAX_EVENTS = 4_000_000
"""The most events that are read from a file; also the most that a recorder keeps by default."""

_MAX_BYTES = 2**29
_MAX_VALUES = 16 * MAX_EVENTS
_REMEDY = "Record the trace again."

Int64 = npt.NDArray[np.int64]
Column = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Instance:
    """One storage from its allocation to its release.

    Attributes:
        index: Its place in `Trace.instances`.
        size: Bytes of the storage, as asked for: without an allocator's rounding.
        dtype: Of the first tensor that was seen on it, without "torch.".
        shape: Of that tensor.
        device: "cpu", "cuda:0" and so on. A fake tensor has the device that it stands for.
        category: What it holds.
        producer: The operation that allocated it, such as "aten.mm.default"; "" if it is external.
        born: Index of its MALLOC; 0 if it is external.
        died: Index of its FREE; None if it was alive when the trace ended.
        external: It existed before the trace began, or was made where no operation was seen.
        saved: Autograd kept it for a backward pass.
        name: Of the parameter, buffer or argument that it is; "" if none is known.
    """

    index: int
    size: int
    dtype: str
    shape: tuple[int, ...]
    device: str
    category: Category
    producer: str
    born: int
    died: int | None
    external: bool = False
    saved: bool = False
    name: str = ""


class Peak(NamedTuple):
    """The most bytes alive at once, and the first event after which that many are."""

    bytes: int
    event: int


class Lifetimes(NamedTuple):
    """Instances as intervals of event indices, for a planner of offsets.

    Attributes:
        instance: Index of the instance.
        lower: Event at which it is allocated.
        upper: Event at which it is released: it is alive in [lower, upper).
        size: Bytes.
    """

    instance: Int64
    lower: Int64
    upper: Int64
    size: Int64


@dataclass(frozen=True, eq=False)
class Trace:
    """The events of a run in order.

    Attributes:
        instances: By index.
        kind: uint8 [events]: MALLOC, FREE, READ or WRITE.
        instance: int32 [events]: which instance.
        op: int32 [events]: which operation, as an index into `op_names`. A FREE has the operation
            behind which it was seen.
        call: int32 [events]: the number of the operation's run, from 0; all events of one run of
            one operation have one number. -1 is before the first.
        time_ns: int64 [events], never decreasing; in units of `clock`.
        clock: What `time_ns` was read from.
        op_names: Names of operations.
        notes: What is not known, a sentence each.
        complete: Whether the callable ran to its end and every event was kept.
        iteration_marks: Index of the event with which each iteration begins; may be empty.
    """

    instances: list[Instance]
    kind: npt.NDArray[np.uint8]
    instance: npt.NDArray[np.int32]
    op: npt.NDArray[np.int32]
    call: npt.NDArray[np.int32]
    time_ns: Int64
    clock: Clock
    op_names: list[str]
    notes: list[str] = field(default_factory=list)
    complete: bool = True
    iteration_marks: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of events."""
        return len(self.kind)

    @functools.cached_property
    def sizes(self) -> Int64:
        """Bytes of each instance, int64 [instances]."""
        return np.array([i.size for i in self.instances], np.int64)

    @functools.cached_property
    def external(self) -> npt.NDArray[np.bool_]:
        """Which instances are external, bool [instances]."""
        return np.array([i.external for i in self.instances], bool)

    def where(self, test: Callable[[Instance], bool]) -> npt.NDArray[np.bool_]:
        """Return which instances pass a test, bool [instances]."""
        return np.array([test(i) for i in self.instances], bool)

    def live_bytes(self, of: npt.NDArray[np.bool_] | None = None, *, alignment: int = 1) -> Int64:
        """Return the bytes alive after each event, int64 [events].

        Instances that are external count from the first event on.

        Args:
            of: Which instances count, bool [instances]; all by default. See `where`.
            alignment: Bytes to a multiple of which an allocator rounds each size up.
        """
        sizes = -(-self.sizes // alignment) * alignment
        external = self.external
        if of is not None:
            sizes = np.where(of, sizes, 0)
        sign = np.zeros(len(self), np.int64)
        sign[self.kind == MALLOC] = 1
        sign[self.kind == FREE] = -1
        change = sign * sizes[self.instance]
        return np.cumsum(change) + int(sizes[external].sum())

    def live_bytes_by_category(self) -> dict[Category, Int64]:
        """Return the bytes alive after each event, for each category that occurs."""
        named = np.array([i.category for i in self.instances], object)
        return {c: self.live_bytes(named == c) for c in CATEGORIES if (named == c).any()}

    def peak(self, of: npt.NDArray[np.bool_] | None = None, *, alignment: int = 1) -> Peak:
        """Return the most bytes alive at once; see `live_bytes`. A trace may have no event."""
        if not len(self):
            return Peak(0, 0)
        live = self.live_bytes(of, alignment=alignment)
        event = int(live.argmax())
        return Peak(int(live[event]), event)

    def lifetimes(self, of: npt.NDArray[np.bool_] | None = None) -> Lifetimes:
        """Return the lifetimes of instances, those that live to the end up to the last event.

        Args:
            of: Which instances, bool [instances]. By default those that were allocated in the
                trace and have a size.
        """
        if of is None:
            of = ~self.external & (self.sizes > 0)
        born = np.array([i.born for i in self.instances], np.int64)
        died = np.array([len(self) if i.died is None else i.died for i in self.instances], np.int64)
        chosen = np.flatnonzero(of)
        return Lifetimes(chosen, born[chosen], died[chosen], self.sizes[chosen])

    def with_clock(self, time_ns: Int64, clock: Clock) -> Trace:
        """Return the trace with other times, int64 [events]."""
        return dataclasses.replace(self, time_ns=time_ns, clock=clock)

    def describe(self, event: int) -> str:
        """Return an event as a line: its kind, instance, size and operation."""
        instance = self.instances[self.instance[event]]
        name = f" {instance.name}" if instance.name else ""
        return (
            f"{KIND_NAMES[self.kind[event]]} #{instance.index}{name} {instance.size} B "
            f"by {self.op_names[self.op[event]]}"
        )

    def check(self) -> None:
        """Refuse a trace that contradicts itself.

        Raises:
            ValueError: Columns differ in length or name what there is not; times decrease; an
                instance is allocated twice, or neither allocated nor external, released twice, or
                touched outside its life; or its `born` and `died` are not its events.
        """
        events, count = len(self), len(self.instances)
        columns: tuple[Column, ...] = (self.instance, self.op, self.call, self.time_ns)
        if any(len(column) != events for column in columns):
            raise ValueError("its columns differ in length")
        if any(i.index != place for place, i in enumerate(self.instances)):
            raise ValueError("its instances are not numbered in order")
        named: tuple[tuple[str, Column, int], ...] = (
            ("kind", self.kind, len(KIND_NAMES)),
            ("instance", self.instance, count),
            ("operation", self.op, len(self.op_names)),
        )
        for what, values, limit in named:
            if events and not (int(values.min()) >= 0 and int(values.max()) < limit):
                raise ValueError(f"an event names no {what} that exists")
        for what, column in (("times", self.time_ns), ("numbers of calls", self.call)):
            if (np.diff(column) < 0).any():
                raise ValueError(f"its {what} decrease")
        marks = np.array(self.iteration_marks, np.int64)
        if (np.diff(marks) < 0).any() or ((marks < 0) | (marks > events)).any():
            raise ValueError("its iterations do not lie in order within its events")
        self._check_lives()

    def _check_lives(self) -> None:
        count, place = len(self.instances), np.arange(len(self))
        for kind, most in ((MALLOC, ~self.external), (FREE, np.ones(count, bool))):
            seen = np.bincount(self.instance[self.kind == kind], minlength=count)
            wrong = seen > most if kind == FREE else seen != most
            if wrong.any():
                raise ValueError(
                    f"instance {int(wrong.argmax())} has {int(seen[wrong.argmax()])} events of "
                    f"kind {KIND_NAMES[kind]}"
                )
        born = np.array([i.born for i in self.instances], np.int64)
        died = np.array([-1 if i.died is None else i.died for i in self.instances], np.int64)
        first, last = np.zeros(count, np.int64), np.full(count, -1, np.int64)
        for kind, found in ((MALLOC, first), (FREE, last)):
            found[self.instance[self.kind == kind]] = place[self.kind == kind]
        if (wrong := (born != first) | (died != last)).any():
            raise ValueError(f"instance {int(wrong.argmax())} has a life that is not its events'")
        last[last < 0] = len(self)
        outside = (place < first[self.instance]) | (place > last[self.instance])
        if outside.any():
            event = int(outside.argmax())
            raise ValueError(
                f"event {event} touches instance {int(self.instance[event])} outside its life"
            )

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON, which `load` reads."""
        instances = {
            name: _listed([getattr(i, name) for i in self.instances])
            for name in (f.name for f in dataclasses.fields(Instance))
            if name != "index"
        }
        data = {
            "graphopt_memory_trace": VERSION,
            "clock": self.clock,
            "complete": self.complete,
            "notes": self.notes,
            "iteration_marks": self.iteration_marks,
            "op_names": self.op_names,
            "instances": instances,
            "events": {
                name: getattr(self, name).tolist()
                for name in ("kind", "instance", "op", "call", "time_ns")
            },
        }
        Path(path).write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Return the trace in a file that `save` wrote.

        Raises:
            SourceError: It cannot be read, is no such file, or contradicts itself.
        """
        where = shown_path(path)
        data = read_json(Path(path), limit=_MAX_BYTES, max_values=_MAX_VALUES, remedy=_REMEDY)
        file = parse(_File, data, where, remedy=_REMEDY)
        columns = [getattr(file.instances, f) for f in _InstanceColumns.model_fields]
        if len({len(column) for column in columns}) > 1:
            raise SourceError(f"{where}: the columns of instances differ in length.", _REMEDY)
        try:
            rows = zip(*columns, strict=True)
            events = file.events
            trace = cls(
                instances=[Instance(index, *row) for index, row in enumerate(rows)],
                kind=np.array(events.kind, np.uint8),
                instance=np.array(events.instance, np.int32),
                op=np.array(events.op, np.int32),
                call=np.array(events.call, np.int32),
                time_ns=np.array(events.time_ns, np.int64),
                clock=file.clock,
                op_names=file.op_names,
                notes=file.notes,
                complete=file.complete,
                iteration_marks=file.iteration_marks,
            )
            trace.check()
        except (ValueError, OverflowError) as problem:
            raise SourceError(f"{where} is no trace: {problem}.", _REMEDY) from problem
        return trace


def _listed(column: Sequence[Any]) -> list[Any]:
    return [list(v) if isinstance(v, tuple) else v for v in column]


_Shape = Annotated[tuple[Size, ...], pydantic.Field(strict=False)]
_Index = Annotated[int, pydantic.Field(ge=-1, le=2**31 - 1)]
_Events = pydantic.Field(max_length=MAX_EVENTS)


class _InstanceColumns(Schema):
    """The fields of `Instance` but its index, in its order."""

    size: list[Size] = _Events
    dtype: list[str] = _Events
    shape: list[_Shape] = _Events
    device: list[str] = _Events
    category: list[Category] = _Events
    producer: list[str] = _Events
    born: list[_Index] = _Events
    died: list[_Index | None] = _Events
    external: list[bool] = _Events
    saved: list[bool] = _Events
    name: list[str] = _Events


class _EventColumns(Schema):
    kind: list[Annotated[int, pydantic.Field(ge=0, lt=len(KIND_NAMES))]] = _Events
    instance: list[_Index] = _Events
    op: list[_Index] = _Events
    call: list[_Index] = _Events
    time_ns: list[Annotated[int, pydantic.Field(ge=0, lt=2**63)]] = _Events


class _File(Schema):
    graphopt_memory_trace: Literal[1]
    clock: Clock
    complete: bool
    notes: list[str]
    iteration_marks: list[_Index]
    op_names: list[str]
    instances: _InstanceColumns
    events: _EventColumns
