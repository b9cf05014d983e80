"""Offsets for published allocation problems, and for problems that are made here.

    python tools/bench_allocation.py FOLDER [--seconds 60] [--greedy] [--out FILE.json]

FOLDER has the CSV files: those called NAME.CAPACITY.csv are to fit that capacity, others to come to
the bound. Made are rectangles of time and memory that are cut into blocks, which fill the rectangle
again without a gap: whole, and with three in ten of the blocks shortened at random. Every plan is
checked for overlaps by `graphopt.memory.planning.check`.

With `--greedy` it measures how long plans in one go take, of the largest file and of random lives.
What is found lies in benchmarks/allocation.json, or allocation_greedy.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.memory.planning import Problem, check_offsets, plan_offsets
from graphopt.memory.planning.greedy import greedy_plans
from graphopt.memory.planning.problem import read_problem

MADE = [(100, 60, 1024), (100, 200, 60), (150, 120, 256), (200, 60, 1024), (200, 200, 60)]
"""Blocks, times and height of the rectangles."""
LIVES = (12_500, 50_000, 200_000)
"""Numbers of blocks with random lives, 200 beginnings and ends long in the mean."""


def cut_apart(seed: int, count: int, times: int, height: int, shortened: float) -> Problem:
    """Return blocks that fill a rectangle.

    A block that is drawn by its area is cut in two, or into five as a pinwheel, which no straight
    cut takes apart.

    Args:
        shortened: Share of the blocks whose lives then end, or begin, up to three tenths inside.
    """
    random = np.random.default_rng(seed)
    blocks = [(0, times, 0, height)]
    while len(blocks) < count:
        area = np.array([(b - a) * (d - c) for a, b, c, d in blocks], float)
        a, b, c, d = blocks.pop(random.choice(len(blocks), p=area / area.sum()))
        wide, tall = (b - a) / times, (d - c) / height
        if min(b - a, d - c) >= 6 and random.random() < 0.3:
            left, right = np.sort(random.choice(np.arange(a + 1, b), 2, replace=False)).tolist()
            low, high = np.sort(random.choice(np.arange(c + 1, d), 2, replace=False)).tolist()
            blocks += [
                (a, right, c, low), (right, b, c, high), (left, b, high, d), (a, left, low, d),
                (left, right, low, high),
            ]  # fmt: skip
        elif b - a > 1 and (random.random() < wide / (wide + tall) or d - c == 1):
            at = int(random.integers(a + 1, b))
            blocks += [(a, at, c, d), (at, b, c, d)]
        elif d - c > 1:
            at = int(random.integers(c + 1, d))
            blocks += [(a, b, c, at), (a, b, at, d)]
        else:
            blocks.append((a, b, c, d))
    lower, upper, low, high = np.array([blocks[k] for k in random.permutation(len(blocks))]).T
    cut = (random.random(len(lower)) * 0.3 * (upper - lower)).astype(np.int64)
    cut[random.random(len(lower)) >= shortened] = 0
    at_end = random.random(len(lower)) < 0.5
    return Problem(
        [str(k) for k in range(len(lower))],
        lower + np.where(at_end, 0, cut),
        upper - np.where(at_end, cut, 0),
        high - low,
    )


def random_lives(count: int) -> Problem:
    """Return blocks that each live together with some two hundred others, whatever their number."""
    random = np.random.default_rng(count)
    lower = random.integers(0, 2 * count, count)
    upper = lower + 1 + random.exponential(200, count).astype(np.int64)
    size = 512 * (1 + random.lognormal(3, 1.5, count).astype(np.int64))
    return Problem([str(k) for k in range(count)], lower, upper, size)


def greedy(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the CPU time of plans in one go: one by valleys, and one by each fit."""
    of = max((read_problem(path) for path in folder.glob("*.csv")), key=len)
    for name, one in (("largest file", of), *(("random lives", random_lives(n)) for n in LIVES)):
        one = one.select(one.takes_room)
        began = time.process_time()
        for how, offsets in greedy_plans(one):
            seconds = time.process_time() - began
            height = check_offsets(one, offsets)
            row = {"problem": name, "blocks": len(one), "plan": how, "height": height}
            yield row | {"cpu_seconds": round(seconds, 3)}
            if how == "largest area first, first fit":
                break
            began = time.process_time()


def problems(folder: Path) -> Iterator[tuple[str, str, Problem, int | None]]:
    """Yield kind, name, problem and capacity."""
    for path in sorted(folder.glob("*.csv")):
        name, _, capacity = path.stem.rpartition(".")
        if not capacity.isdecimal():
            name, capacity = path.stem, ""
        kind = "published, with a capacity" if capacity else "published"
        yield kind, name, read_problem(path), int(capacity) if capacity else None
    for count, times, height in MADE:
        for shortened in (0.0, 0.3):
            name = f"{count} blocks, {times} x {height}" + (", shortened" if shortened else "")
            yield "made", name, cut_apart(count, count, times, height, shortened), height


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of CSV files")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--greedy", action="store_true", help="time plans in one go instead")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for row in greedy(args.folder) if args.greedy else ():
        rows.append(row)
        print(row, flush=True)
    for kind, name, of, capacity in () if args.greedy else problems(args.folder):
        began, used = time.perf_counter(), time.process_time()
        plan = plan_offsets(of, capacity, seconds=args.seconds)
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        assert check_offsets(of, plan.offsets) == plan.height
        rows.append(
            {
                "kind": kind,
                "name": name,
                "blocks": len(of),
                "capacity": capacity,
                "bound": plan.bound,
                "height": plan.height,
                "outcome": plan.outcome.value,
                "how": plan.how,
                "seconds": round(seconds, 3),
                "cpu_seconds": round(cpu, 3),
            }
        )
        print(rows[-1], flush=True)
    result = {
        "command": f"python tools/bench_allocation.py {args.folder.name}"
        + (f" --seconds {args.seconds:g}" if args.seconds != 60 else "")
        + (" --greedy" if args.greedy else ""),
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("numpy",)},
        "rows": rows,
    }
    out = args.out or Path("benchmarks") / f"allocation{'_greedy' * args.greedy}.json"
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
