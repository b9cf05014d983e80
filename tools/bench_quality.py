"""Perplexity and PIQA accuracy of a model in every form: they must agree.

    python tools/bench_quality.py --text FILE [--piqa FILE] [--model demo]
                                  [--out benchmarks/quality.json]

The model is compiled to a torch and an ONNX artifact; `graphopt eval` then measures the source and
both artifacts, on the whole text in windows of 2048 tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "onnxruntime", "numpy")


def evaluate(model: str, backend: str, options: list[str]) -> dict[str, Any]:
    """Return what `graphopt eval --json` prints."""
    command = ["graphopt", "eval", model, "--backend", backend, *options, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--piqa", type=Path, help="PIQA rows as JSON lines")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/quality.json"))
    args = parser.parse_args()
    options = ["--text", str(args.text)]
    options += ["--piqa", str(args.piqa)] if args.piqa else []
    with tempfile.TemporaryDirectory(prefix="bench-quality-") as work:
        out = str(Path(work) / "out")
        compile_ = ["graphopt", "compile", args.model, "-o", out, "--emit", "torch,onnx"]
        subprocess.run([*compile_, "--no-verify"], capture_output=True, check=True)
        runs = {
            "source": evaluate(args.model, "auto", options),
            "torch": evaluate(out, "torch", options),
            "onnx": evaluate(out, "onnx", options),
        }
    for run in runs.values():
        del run["model"]
    result = {
        "command": "python tools/bench_quality.py",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "model": args.model,
        "text": args.text.name,
        "piqa": args.piqa.name if args.piqa else None,
        "runs": runs,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, run in runs.items():
        print(name, run["perplexity"], run["piqa_accuracy"], f"{run['seconds']:.0f} s")


if __name__ == "__main__":
    main()
