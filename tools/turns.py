"""Timing runs on a GPU in turns, and keeping what each gave, or how it failed."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from graphopt.support.recorded import record

ON_GPU = torch.cuda.is_available()
TURNS = 7

Result = dict[str, Any]


def recorded(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a run as a CUDA graph, so that nothing is launched one by one."""
    if not ON_GPU:
        return run
    return record(run)[0].replay


def microseconds(runs: Mapping[str, Callable[[], Any]], per: int = 1) -> dict[str, list[float]]:
    """Return microseconds of runs that are made in turns, each divided by `per`.

    A turn of a run lasts some milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    counts: dict[str, int] = {}
    for name, run in runs.items():
        run()
        spent = _timed(run, 2)
        counts[name] = max(2, min(50, int(6e3 / spent))) if ON_GPU else 1
    for turn in range(TURNS if ON_GPU else 1):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            times[name].append(_timed(runs[name], counts[name]) / per)
    return times


def microseconds_in_graphs(
    runs: Mapping[str, Callable[[], Any]], times: int = 4
) -> dict[str, list[float]]:
    """As `microseconds`, of `times` runs in a CUDA graph: without what their launches take.

    A prompt's launches run ahead of its kernels, and a decoding step is a graph.
    """
    graphs = {
        name: recorded(lambda run=run: [run() for _ in range(times)]) for name, run in runs.items()
    }
    return microseconds(graphs, per=times)


def _timed(run: Callable[[], Any], count: int) -> float:
    """Return the microseconds of one of `count` runs."""
    if not ON_GPU:
        started = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / count


def median(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in times.items()}


class Rows:
    """Results of a part, of which each is made by itself: one that fails is kept as it failed.

    Args:
        keep: Called behind each result with all there are, so that none is lost with the machine.
    """

    def __init__(self, keep: Callable[[list[Result]], None] = lambda rows: None) -> None:
        self.rows: list[Result] = []
        self.lines: list[str] = []
        self._keep = keep

    def fail(self, name: str, error: Exception) -> None:
        """Keep what raised, as it is handled, in place of a result."""
        self.rows.append({"name": name, "failed": traceback.format_exc()})
        self.lines.append(f"{name}: FAILED: {type(error).__name__}: {str(error)[:160]}")
        print(self.lines[-1], flush=True)
        self._keep(self.rows)

    def add(self, name: str, make: Callable[[], tuple[Result, str]]) -> Result | None:
        try:
            result, line = make()
        except Exception as error:
            self.fail(name, error)
            if ON_GPU:
                torch.cuda.synchronize()
            return None
        self.rows.append({"name": name, **result})
        self.lines.append(f"{name}: {line}")
        print(self.lines[-1], flush=True)
        self._keep(self.rows)
        return result


def best_of(
    rows: Rows, name: str, runs: Mapping[str, Callable[[], Any]], check: Callable[[Any], None]
) -> str | None:
    """Time runs of the same by other tiles, those that are right; return the fastest's name."""
    fit: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for label, run in runs.items():
        try:
            check(run())
            fit[label] = run
        except Exception as error:
            failed[label] = f"{type(error).__name__}: {str(error)[:300]}"

    def make() -> tuple[Result, str]:
        times = microseconds(fit)
        found = dict(sorted(median(times).items(), key=lambda row: row[1]))
        shown = ", ".join(f"{label} {value:.1f}" for label, value in list(found.items())[:6])
        if failed:
            shown += f"; {len(failed)} failed, such as {next(iter(failed.items()))}"
        return {"microseconds": times, "failed_tiles": failed}, shown

    result = rows.add(f"tiles {name}", make)
    if result is None or not fit:
        return None
    return min(fit, key=lambda label: statistics.median(result["microseconds"][label]))
