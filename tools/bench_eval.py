"""Time, memory and figure of `graphopt eval` in every form, by one or several versions in turns.

    python tools/bench_eval.py --text test-dev.txt [--windows 8] [--repeats 3]
                               [--version NAME=GRAPHOPT ...] [--out benchmarks/eval.json]

A version is the `graphopt` command of an environment; each compiles its own artifacts and measures
them, and the versions take turns, so that what else a machine does meets all of them. Times are of
whole commands; `seconds` is what the command itself says of the measurement, without opening.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "onnxruntime", "numpy")
FORMS = ("source", "torch", "onnx")


def measure(command: list[str]) -> dict[str, Any]:
    """Run a command; return what it prints as JSON, with its time, CPU time and peak memory."""
    with tempfile.TemporaryFile() as printed:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        printed.seek(0)
        found = json.load(printed)
    return {
        "wall_seconds": wall,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        **{name: found[name] for name in ("seconds", "perplexity", "tokens")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--windows", type=int, help="windows of the text; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument(
        "--version", action="append", metavar="NAME=GRAPHOPT", help="by default today=graphopt"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/eval.json"))
    args = parser.parse_args()
    versions = dict(item.split("=", 1) for item in args.version or ["today=graphopt"])
    forms = args.forms.split(",")
    options = ["--text", str(args.text), "--json"]
    options += ["--windows", str(args.windows)] if args.windows else []
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {
        form: {name: [] for name in versions} for form in forms
    }
    with tempfile.TemporaryDirectory(prefix="bench-eval-") as work:
        emit = ",".join(form for form in forms if form != "source")
        for name, graphopt in versions.items():
            if emit:
                out = ["-o", f"{work}/{name}", "--emit", emit, "--no-verify"]
                subprocess.run(
                    [graphopt, "compile", args.model, *out], capture_output=True, check=True
                )
        for turn in range(args.repeats):
            for form in forms:
                for name, graphopt in versions.items():
                    model = [args.model] if form == "source" else [f"{work}/{name}"]
                    model += [] if form == "source" else ["--backend", form]
                    run = measure([graphopt, "eval", *model, *options])
                    runs[form][name].append(run)
                    print(
                        f"{turn} {form:7} {name:8} {run['wall_seconds']:7.1f} s, "
                        f"{run['cpu_seconds']:7.1f} s of CPU, {run['peak_bytes'] / 1e9:.2f} GB, "
                        f"measured in {run['seconds']:.1f} s: {run['perplexity']:.6f}",
                        flush=True,
                    )
    cores = len(os.sched_getaffinity(0))
    windows = f" --windows {args.windows}" if args.windows else ""
    result = {
        "command": f"python tools/bench_eval.py --text {args.text.name}{windows}"
        f" --repeats {args.repeats}",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {cores} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "model": args.model,
        "text": args.text.name,
        "runs": runs,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for form, by_version in runs.items():
        for name, repeated in by_version.items():
            median = statistics.median(run["seconds"] for run in repeated)
            print(f"{form} {name}: {median:.1f} s, the median of {len(repeated)}")


if __name__ == "__main__":
    main()
