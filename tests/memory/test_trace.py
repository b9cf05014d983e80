"""The columns of a trace: what they say, what they refuse, and that a file gives them back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import SourceError
from graphopt.memory.trace import FREE, MALLOC, READ, WRITE, Instance, Trace

Row = tuple[int, int]


def trace_of(sizes: list[int], rows: list[Row], external: tuple[int, ...] = ()) -> Trace:
    """Return a trace of (kind, instance) events, one operation each."""
    kind = np.array([k for k, _ in rows], np.uint8)
    which = np.array([i for _, i in rows], np.int32)

    def event(what: int, instance: int) -> int | None:
        return next((n for n, row in enumerate(rows) if row == (what, instance)), None)

    instances = [
        Instance(
            index=i,
            size=size,
            dtype="float32",
            shape=(size // 4,),
            device="cpu",
            category="weight" if i in external else "activation",
            producer="" if i in external else "aten.mm.default",
            born=event(MALLOC, i) or 0,
            died=event(FREE, i),
            external=i in external,
        )
        for i, size in enumerate(sizes)
    ]
    count = np.arange(len(rows))
    return Trace(
        instances, kind, which, np.zeros(len(rows), np.int32), count.astype(np.int32),
        count.astype(np.int64), "operation index", ["aten.mm.default"],
    )  # fmt: skip


CHAIN = trace_of(
    [100, 40, 600],
    [(READ, 0), (MALLOC, 1), (WRITE, 1), (MALLOC, 2), (READ, 1), (WRITE, 2), (FREE, 1), (FREE, 2)],
    external=(0,),
)


def test_live_bytes_count_what_was_there_before() -> None:
    CHAIN.check()
    assert CHAIN.live_bytes().tolist() == [100, 140, 140, 740, 740, 740, 700, 100]
    assert CHAIN.peak() == (740, 3)
    assert CHAIN.peak(alignment=512).bytes == 512 + 512 + 1024
    assert {c: v[-2] for c, v in CHAIN.live_bytes_by_category().items()} == {
        "weight": 100,
        "activation": 600,
    }
    made = CHAIN.where(lambda i: not i.external)
    assert CHAIN.peak(made) == (640, 3)


def test_lifetimes_are_half_open_and_leave_out_what_no_planner_places() -> None:
    found = CHAIN.lifetimes()
    assert [c.tolist() for c in found] == [[1, 2], [1, 3], [6, 7], [40, 600]]


def test_a_trace_without_events_has_no_peak() -> None:
    empty = trace_of([], [])
    empty.check()
    assert empty.peak() == (0, 0)
    assert empty.live_bytes().tolist() == []


def test_a_file_gives_the_trace_back(tmp_path: Path) -> None:
    kept = dataclasses.replace(
        CHAIN, notes=["it stopped"], complete=False, iteration_marks=[0, 3, 8]
    )
    kept.save(tmp_path / "trace.json")
    again = Trace.load(tmp_path / "trace.json")
    for name in (f.name for f in dataclasses.fields(Trace)):
        one, other = getattr(kept, name), getattr(again, name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            assert one.tolist() == other.tolist()
        else:
            assert one == other


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[int], list[Row]]:
    """Draw sizes and an order of mallocs, accesses and frees that is possible."""
    sizes = draw(st.lists(st.integers(0, 5000), max_size=8))
    rows: list[Row] = []
    alive: list[int] = []
    waiting = list(range(len(sizes)))
    while waiting or (alive and draw(st.booleans())):
        if waiting and (not alive or draw(st.booleans())):
            alive.append(waiting.pop(0))
            rows.append((MALLOC, alive[-1]))
        else:
            instance = draw(st.sampled_from(alive))
            kind = draw(st.sampled_from([READ, WRITE, FREE]))
            rows.append((kind, instance))
            if kind == FREE:
                alive.remove(instance)
    return sizes, rows


@pytest.mark.slow
@given(runs())
def test_live_bytes_are_those_of_a_walk(run: tuple[list[int], list[Row]]) -> None:
    sizes, rows = run
    trace = trace_of(sizes, rows)
    trace.check()
    alive: set[int] = set()
    expected = []
    for kind, instance in rows:
        if kind == MALLOC:
            alive.add(instance)
        elif kind == FREE:
            alive.remove(instance)
        expected.append(sum(sizes[i] for i in alive))
    assert trace.live_bytes().tolist() == expected
    assert trace.peak().bytes == max(expected, default=0)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(READ, 0)], "0 events of kind malloc"),
        ([(MALLOC, 0), (MALLOC, 0)], "2 events of kind malloc"),
        ([(MALLOC, 0), (FREE, 0), (FREE, 0)], "2 events of kind free"),
        ([(MALLOC, 0), (FREE, 0), (READ, 0)], "outside its life"),
        ([(WRITE, 0), (MALLOC, 0)], "outside its life"),
        ([(MALLOC, 0), (READ, 7)], "no instance that exists"),
        ([(MALLOC, 0), (9, 0)], "no kind that exists"),
    ],
)
def test_contradictions_are_refused(rows: list[Row], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        trace_of([8], rows).check()


def test_times_may_not_be_reversed() -> None:
    reversed_times = CHAIN.with_clock(CHAIN.time_ns[::-1].copy(), "host")
    with pytest.raises(ValueError, match="times decrease"):
        reversed_times.check()


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("graphopt_memory_trace", 2, "should be 1"),
        ("clock", "sundial", "clock"),
        ("iteration_marks", [5, 2], "iterations"),
        ("op_names", [], "no operation that exists"),
        ("surplus", 1, "no such entry is known"),
    ],
)
def test_a_file_that_says_no_trace_is_refused(
    tmp_path: Path, entry: str, value: object, reason: str
) -> None:
    path = tmp_path / "trace.json"
    CHAIN.save(path)
    data = json.loads(path.read_text())
    data[entry] = value
    path.write_text(json.dumps(data))
    with pytest.raises(SourceError, match=reason):
        Trace.load(path)


def test_columns_of_a_file_have_one_length(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    CHAIN.save(path)
    for part, column in (("instances", "size"), ("events", "time_ns")):
        data = json.loads(path.read_text())
        data[part][column].pop()
        (tmp_path / "short.json").write_text(json.dumps(data))
        with pytest.raises(SourceError, match="differ in length"):
            Trace.load(tmp_path / "short.json")
