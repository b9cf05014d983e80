"""Compare every decoder family of the installed transformers with what graphopt makes of it.

    python tools/sweep_families.py --seed 0 --jobs 16 --passes

Small models of drawn configs (tests/family_configs.py) go through every form
(tests/family_sweep.py). Each family has a process of its own with a time limit, so that a crash
or a hang is a row of the result, benchmarks/families.json, which tools/tables.py makes a table of.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from family_configs import families  # noqa: E402
from family_sweep import RECIPES, sweep, verdicts  # noqa: E402

PACKAGES = ("torch", "transformers", "onnxruntime")
MEMORY = 16 << 30
"""Bytes of address space that a family may take."""


def work_on(family: str, seed: int, count: int, passes: bool, result: Path) -> None:
    """Sweep one family; in a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    log = os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    rows = []
    for number in range(count):
        with tempfile.TemporaryDirectory() as folder:
            recipes = tuple(RECIPES) if passes else ()
            rows.append(sweep(family, seed, number, Path(folder), recipes=recipes))
        result.write_text(json.dumps(rows, default=str))


def warm_up() -> None:
    """Import what every family needs, so that processes forked from here have it."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    from tiny_models import tiny_model
    from transformers.utils import logging

    import graphopt as go
    from graphopt.lowering import get_emitter
    from graphopt.pass_manager import verification  # noqa: F401
    from graphopt.support import boundary  # noqa: F401

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for name in ("torch", "onnx", "hf"):
        get_emitter(name)
    go.Pipeline.default().run(go.capture(tiny_model()), go.RunOptions(verify=False))


def run(
    args: argparse.Namespace, names: list[str], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Return every family's rows, `args.jobs` families at a time.

    Args:
        save: Called with all rows so far: a later family may be cut off.
    """
    context = multiprocessing.get_context("fork")
    found: dict[str, list[dict[str, Any]]] = {}
    running: dict[str, tuple[Any, float]] = {}
    waiting = list(names)
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                name = waiting.pop(0)
                result = Path(folder) / f"{name}.json"
                process = context.Process(
                    target=work_on, args=(name, args.seed, args.count, args.passes, result)
                )
                process.start()
                running[name] = process, time.monotonic()
            for name, (process, began) in list(running.items()):
                late = time.monotonic() - began > args.limit * args.count
                if process.is_alive() and not late:
                    continue
                process.kill()
                process.join()
                del running[name]
                result = Path(folder) / f"{name}.json"
                rows = json.loads(result.read_text()) if result.exists() else []
                if late or process.exitcode:
                    how = f"took over {args.limit} s" if late else f"exit {process.exitcode}"
                    rows.append({"draw": len(rows), "ended": how})
                found[name] = rows
                for row in rows:
                    row["verdicts"] = verdicts(row)
                    said = [
                        f"{form}: {text}"
                        for form, text in row["verdicts"].items()
                        if text != "right"
                    ]
                    print(f"{name} {row['draw']}:", "; ".join(said) or "right", flush=True)
                if any("! " in text for row in rows for text in row["verdicts"].values()):
                    print(result.with_suffix(".log").read_text(errors="replace")[-3000:])
                save({name: found[name] for name in sorted(found)})
            time.sleep(0.05)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", default="", help="names, with commas; by default all")
    parser.add_argument("--count", type=int, default=1, help="drawn configs of each family")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds of a drawn config")
    parser.add_argument("--passes", action="store_true", help="prune-blocks and carve-moe too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "families.json")
    args = parser.parse_args()
    warm_up()
    names = args.families.split(",") if args.families else families()
    about = {
        "command": "python tools/sweep_families.py " + shlex.join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU",
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }

    def save(rows: dict[str, Any]) -> None:
        text = json.dumps({**about, "families": rows}, indent=1, default=str)
        args.out.write_text(text + "\n", encoding="utf-8")

    found = run(args, names, save)
    wrong = sum(
        text.startswith("!")
        for rows in found.values()
        for row in rows
        for text in row["verdicts"].values()
    )
    print(f"{len(names)} families, {wrong} wrong or without a sentence")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
