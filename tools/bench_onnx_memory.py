"""What memory ONNX Runtime takes for our graphs, beside our own plans for the same steps.

    python tools/bench_onnx_memory.py FOLDER [--name NAME] [--phase PHASE]

FOLDER comes from `graphopt compile MODEL --emit torch,onnx`, for a CPU. For prompts and decoding
steps of several lengths, sessions of its graph are opened and run as `graphopt memory` does, each
in a process of its own: as they are by default, without memory patterns, and without an arena.
Beside them are the live bytes and the planned arena of the program's operators in fp32, and what
the static arena of the emitted package has for the same step: it holds neither the cache nor what
has no `out=` form.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from graphopt.backends.onnx_memory import PHASES, onnx_graph, session_memory
from graphopt.capture import capture
from graphopt.cli.memory_onnx import own_step

LENGTHS = {"prefill": (64, 256, 512), "decode": (64, 512, 1024)}
SESSIONS = {
    "default": {},
    "without patterns": {"pattern": False},
    "without arena": {"arena": False},
}
"""Options of sessions. Without an arena patterns stay as they are."""


def package_arenas(folder: Path, lengths: set[int]) -> dict[tuple[str, int], dict[str, int]]:
    """Return by phase and length what the static arena of an emitted package plans for a step."""
    spec = importlib.util.spec_from_file_location("emitted_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load(folder)
    found = {}
    for length in sorted(lengths):
        arena = module.arena_for(model)
        ids = torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(0))
        for _ in module.steps_in_arena(model, ids.tolist(), 3, arena):
            pass
        for key, step in arena.steps.items():
            found[key[0], length] = {
                "planned": step.height,
                "live": step.live,
                "left_out": sum(size for _, size in step.left_out.values()),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of an emitted model, with both forms")
    parser.add_argument("--name", help="of the model; by default the folder's")
    parser.add_argument(
        "--phase", nargs="+", choices=PHASES, default=list(PHASES),
        help="rows of the other phase are kept",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("benchmarks/onnx_memory.json"))
    args = parser.parse_args()
    graph = onnx_graph(args.folder)
    if graph is None:
        sys.exit(f"{args.folder} has no ONNX form")
    program = capture(str(args.folder))
    constants = [weight.name for weight in program.weights if weight.constant]
    arenas = package_arenas(args.folder, {n for p in args.phase for n in LENGTHS[p]})
    kept = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    rows: list[dict[str, Any]] = [r for r in kept.get("rows", ()) if r["phase"] not in args.phase]
    for phase in args.phase:
        for seq in LENGTHS[phase]:
            row: dict[str, Any] = {
                "phase": phase,
                "batch": 1,
                "seq": seq,
                "own": asdict(own_step(program, phase, 1, seq)),
                "package": arenas.get((phase, seq)),
                "sessions": {},
            }
            for name, options in SESSIONS.items():
                found = session_memory(graph, phase, seq=seq, constants=constants, **options)
                row["sessions"][name] = found.to_json()
                print(phase, seq, name, found, flush=True)
            rows.append(row)
    result = {
        "command": f"python tools/bench_onnx_memory.py {args.folder.name}",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {platform.system()}",
        "versions": {name: metadata.version(name) for name in ("torch", "onnxruntime")},
        "name": args.name or args.folder.name,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
