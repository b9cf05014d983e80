"""Perplexity with the beginning-of-sequence token before every window, and as papers measure.

    python tools/bench_beginnings.py MODEL [MODEL ...] --text FILE [--windows 4] [--seqlen 512]
                                     [--out benchmarks/beginnings.json]

`graphopt eval` measures each model both ways (docs/evaluate.md).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from bench_quality import evaluate

PACKAGES = ("torch", "transformers", "numpy")
WAYS = ("every", "first")


def measured(model: str, options: list[str]) -> dict[str, Any]:
    """Return what `graphopt eval --json` prints, of a model called by its file's name."""
    return {**evaluate(model, "auto", options), "model": Path(model).name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/beginnings.json"))
    args = parser.parse_args()
    size = ["--windows", str(args.windows), "--seqlen", str(args.seqlen)]
    runs = [
        {way: measured(model, ["--text", str(args.text), *size, "--bos", way]) for way in WAYS}
        for model in args.models
    ]
    names = " ".join(Path(model).name for model in args.models)
    result = {
        "command": f"python tools/bench_beginnings.py {names} --text {args.text.name} "
        + " ".join(size),
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "text": args.text.name,
        "runs": runs,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for run in runs:
        print(run["every"]["model"], *(f"{way} {run[way]['perplexity']:.2f}" for way in WAYS))


if __name__ == "__main__":
    main()
