"""Passes on a GPU of limited memory: how they size their batches, and what they then take.

    python tools/bench_memory_passes.py [--memory 8GB,24GB] [--only fuse-blocks]

torch may reserve no more than the memory that is named, and passes are told so. Kept are the
batches that were predicted to fit, what was predicted and what was reserved at most. On an H200 a
run takes about half a minute. Results are kept under benchmarks/memory_passes.json after each.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from measure import keep
from results import given_words

import graphopt as go
from graphopt.capture import capture
from graphopt.errors import GraphoptError, first_line
from graphopt.support.quantities import parse_bytes

OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "memory_passes.json"

RECIPES = {
    "fuse-blocks": "prune-blocks{ratio=0.25},fuse-blocks{steps=12,generated_windows=0}",
    "flatquant": "flatquant{w=4,a=4,kv=4,steps=8,windows=16,generated_windows=0}",
    "carve-moe": "carve-moe{shared=3,active=3,experts=8}",
}


def run(recipe: str, memory: int, calib: Path | None, device: torch.device) -> dict[str, Any]:
    """Return what the passes of a recipe said of their batches, and what was reserved."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(memory / whole, 1.0))
        torch.cuda.reset_peak_memory_stats()
    options = go.RunOptions(calib=calib, device=device, verify=False, memory=memory)
    found: dict[str, Any] = {"recipe": recipe, "memory": memory}
    started = time.perf_counter()
    try:
        _, report = go.Pipeline.parse(recipe).run(capture("demo"), options)
        found["batches"] = {
            entry.name: entry.details["batches"]
            for entry in report.passes
            if entry.details.get("batches")
        }
    except GraphoptError as refused:
        found["refused"] = f"{refused.message} {refused.remedy}"
    except torch.cuda.OutOfMemoryError as short:
        found["refused"] = f"out of memory: {first_line(short)}"
    found["seconds"] = time.perf_counter() - started
    if device.type == "cuda":
        found["max_memory_reserved"] = torch.cuda.max_memory_reserved()
        found["max_memory_allocated"] = torch.cuda.max_memory_allocated()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory", default="6GB,10GB,24GB", help="sizes, by commas")
    parser.add_argument("--only", choices=RECIPES)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    runs: list[dict[str, Any]] = []
    for name, recipe in RECIPES.items():
        if arguments.only not in (None, name):
            continue
        for text in arguments.memory.split(","):
            memory = parse_bytes("--memory", text)
            runs.append({"pass": name, **run(recipe, memory, arguments.calib, device)})
            print(runs[-1], flush=True)
            what = name if arguments.only else "passes"
            command = ["python", "tools/bench_memory_passes.py", given_words()]
            keep(arguments.out, what, command, device, {"runs": runs})


if __name__ == "__main__":
    main()
