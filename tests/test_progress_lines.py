"""What long work says where there is no terminal, and after Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt.cli.progress_lines import FIRST_SECONDS, ProgressLines
from graphopt.storage.snapshot import SNAPSHOT_NAME, kept_work
from graphopt.support.quantities import format_bytes, format_duration


class Clock:
    """A clock that goes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def lines(clock: Clock, said: list[str]) -> ProgressLines:
    return ProgressLines(said.append, clock)


def test_no_time_is_told_of_a_step_unlike_those_before(
    lines: ProgressLines, clock: Clock, said: list[str]
) -> None:
    lines("what fits", 0, 3)
    clock.now += 40
    lines("what fits", 2, 3)
    clock.now += 10
    lines.tick()
    clock.now += 80
    lines("what fits", 2, 3)
    lines.tick()
    assert said == ["[50 s] what fits: 67%, about 25 s left", "[2 min] what fits: 67%"]


def test_short_work_says_nothing(lines: ProgressLines, clock: Clock, said: list[str]) -> None:
    lines("capture", 0, 1)
    clock.now += FIRST_SECONDS - 1
    lines("capture", 1, 1)
    lines.milestone("canonicalise: changed 3 in 0.1 s")
    lines.tick()
    assert said == []
    clock.now += 1
    lines.milestone("insert-kv-cache: changed 2 in 0.1 s")
    assert said == ["[10 s] insert-kv-cache: changed 2 in 0.1 s"]


def test_long_work_is_named_with_the_time_left(
    lines: ProgressLines, clock: Clock, said: list[str]
) -> None:
    lines("prune-blocks", 0, 1)
    clock.now += 20
    lines.tick()
    lines("scoring", 0, 200)
    clock.now += 10
    lines("scoring", 1, 200)
    lines.tick()  # too little is done to tell
    clock.now += 40
    lines("scoring", 50, 200)  # a quarter in 50 s
    lines.tick()
    lines("scoring", 200, 200)
    lines.tick()
    assert said == [
        "[20 s] prune-blocks",
        "[30 s] scoring: 0%",
        "[70 s] scoring: 25%, about 2 min left",
        "[70 s] prune-blocks",
    ]


def test_work_that_is_taken_up_is_measured_from_there(
    lines: ProgressLines, clock: Clock, said: list[str]
) -> None:
    lines("training", 900, 1000)
    clock.now += 60
    lines("training", 950, 1000)  # half of what was left
    lines.tick()
    assert said == ["[60 s] training: 95%, about 60 s left"]


def test_quantities() -> None:
    assert [format_duration(s) for s in (0.4, 89.0, 91.0, 5399.0, 11100.0)] == [
        "0 s", "89 s", "2 min", "1 h 30 min", "3 h 05 min",
    ]  # fmt: skip
    assert [format_bytes(count) for count in (12, 4e3, 5.381e8)] == ["12 B", "4.0 kB", "538.1 MB"]


def test_what_an_interrupted_compile_keeps(tmp_path: Path) -> None:
    work = tmp_path / ".out.work"
    assert kept_work(work) is None
    work.mkdir()
    assert kept_work(work) is None
    (work / "distil-0123.pt").write_bytes(bytes(100))
    kept = kept_work(work)
    assert kept is not None and (kept.passes, kept.within, kept.bytes) == (0, True, 100)
    for number in (1, 2):
        folder = work / f"{number:02d}-abc"
        folder.mkdir()
        (folder / SNAPSHOT_NAME).write_text(json.dumps({}))
    kept = kept_work(work)
    assert kept is not None and (kept.passes, kept.within, kept.bytes) == (2, False, 104)
