"""Seconds by what they were spent on, by a clock that is set."""

from __future__ import annotations

from graphopt.support import clock
from graphopt.support.clock import Clock


def test_work_inside_other_work_counts_as_its_own(monkeypatch):
    now = 0.0
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    counted = Clock("outer", "inner", "never")
    now = 5.0
    with counted.counting("outer"):
        now = 6.0
        with counted.counting("inner"):
            now = 10.0
            with counted.counting("outer"):
                now = 10.5
        now = 12.0
    now = 20.0
    with counted.counting("inner"):
        now = 21.0
    assert counted.seconds == {"outer": 1 + 0.5 + 1.5, "inner": 4 + 1, "never": 0.0}
