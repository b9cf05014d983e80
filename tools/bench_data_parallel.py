"""Evaluation and `fuse-blocks` on one device and shared by all ranks, in turns: speed, and results.

    torchrun --standalone --nproc-per-node 2 tools/bench_data_parallel.py --text test-dev.txt
        --calib valid.txt [--model demo] [--device auto] [--windows 64] [--seqlen 2048]
        [--steps 200] [--batch 8] [--rounds 3] [--seconds 90]
        [--out benchmarks/data_parallel.json]

All ranks hold the model. While one device is measured, the first rank works by itself and the
others wait, so that nothing else differs. A first round of each is left out: weights are read in
it, and kernels made. `--seconds` ends the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.errors import UsageError
from graphopt.evaluate.perplexity import perplexity, read_text
from graphopt.execute.language_model import load_tokenizer
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Program
from graphopt.support import ranks
from graphopt.support.devices import found_gpu

PACKAGES = ("torch", "transformers", "numpy")
BEGINNING = 10
"""Steps of the round that is left out."""

Run = dict[str, Any]


def by_itself(measure: Callable[[], Run]) -> Run:
    """Return what the first rank measures while the others wait; they get {}."""
    all_of_them = ranks.here()
    found: Run = {}
    if all_of_them.first:
        with mock.patch.object(ranks, "_here", ranks.ALONE):
            found = measure()
    all_of_them.wait()
    return found


def evaluation(args: argparse.Namespace, device: str) -> Callable[[bool], Run]:
    model = open_language_model(args.model, "program", device=device)
    tokenizer, text = load_tokenizer(model), read_text(args.text)

    def measure(begins: bool) -> Run:
        found = perplexity(model, tokenizer, text, windows=args.windows, seqlen=args.seqlen)
        speed = found.windows / found.seconds
        return {"windows_per_second": speed, "windows": found.windows,
                "seconds": found.seconds, "perplexity": found.perplexity}  # fmt: skip

    return measure


def training(args: argparse.Namespace, device: str) -> Callable[[bool], Run]:
    program = go.capture(args.model)
    blocks = len(find_blocks(program))
    removed = list(range(blocks // 2, blocks // 2 + max(1, blocks // 4)))
    options = go.RunOptions(calib=args.calib, device=device, verify=False)

    def measure(begins: bool) -> Run:
        steps = min(BEGINNING, args.steps) if begins else args.steps
        recipe = (
            f"prune-blocks{{remove={removed}}},fuse-blocks{{steps={steps},batch={args.batch},"
            f"seqlen={args.seqlen},generated_windows=0,warm_start=false}}"
        )
        parsed = go.Pipeline.parse(recipe.replace(" ", ""))
        result, report = parsed.run(program, options)
        told = report.passes[-1].to_json()["details"]
        (trained,) = told["training"]
        seconds = trained["seconds"] - trained["preparing"]
        return {
            "steps_per_second": trained["steps"] / seconds,
            "steps": trained["steps"],
            "seconds": seconds,
            "pass_seconds": told["seconds"]["all"],
            "checks": trained["checks"],
            "weights": trained_weights(program, result),
        }

    return measure


def trained_weights(before: Program, after: Program) -> dict[str, tuple[Tensor, Tensor]]:
    """Return weights that training changed, with what they were."""
    return {
        weight.name: (before.weights[weight.name].load().float(), weight.load().float())
        for weight in after.used_weights()
        if weight.name in before.weights
        and before.weights[weight.name].producer is not weight.producer
    }


def off(one: Run, shared: Run) -> dict[str, float]:
    """Return how far the results of one device and of all ranks are apart, relative to the first.

    Weights are, in units of how far training moved them.
    """
    if "perplexity" in one:
        return {"perplexity": abs(shared["perplexity"] / one["perplexity"] - 1)}
    apart = moved = 0.0
    for name, (start, end) in one["weights"].items():
        apart += float((shared["weights"][name][1] - end).double().square().sum())
        moved += float((end - start).double().square().sum())
    losses = [run["checks"][-1][1] for run in (one, shared)]
    return {"weights": (apart / moved) ** 0.5, "held_out_loss": abs(losses[1] / losses[0] - 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--calib", type=Path, required=True, help="text to train on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=90.0, help="no round begins after these")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/data_parallel.json"))
    args = parser.parse_args()
    with ranks.joined(args.device) as group:
        if group.world == 1:
            raise UsageError("One process has nothing to share.", "Start it by torchrun.")
        with contextlib.ExitStack() as stack:
            if not group.first:
                nothing = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nothing))
            measured(args, group)


def measured(args: argparse.Namespace, group: ranks.Ranks) -> None:
    """Measure in turns, print a table, and keep the results."""
    begun = group.clock()
    gpu = found_gpu() if args.device == "auto" else None
    device = args.device if args.device != "auto" else "cuda" if gpu is not None else "cpu"
    kinds = {"eval": evaluation(args, device), "fuse-blocks": training(args, device)}
    found: dict[str, dict[str, list[Run]]] = {name: {"one": [], "all": []} for name in kinds}
    apart: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for turn in range(-1, args.rounds):
        for name, measure in kinds.items():
            if turn > 0 and group.clock() - begun > args.seconds:
                print(f"{name}: {turn} rounds in {args.seconds:g} s", flush=True)
                continue
            order = (("one", "all"), ("all", "one"))[turn % 2]
            run = partial(measure, turn < 0)
            runs = {who: run() if who == "all" else by_itself(run) for who in order}
            if not group.first:
                continue
            difference = off(runs["one"], runs["all"])
            for who, run in runs.items():
                run.pop("weights", None)
                if turn >= 0:
                    found[name][who].append(run)
            print(f"{turn} {name}: {speeds(runs)}, apart {difference}", flush=True)
            if turn >= 0:
                apart[name].append(difference)
                keep(args, group, device, found, apart)


def speed_of(run: Run) -> float:
    return float(run.get("windows_per_second") or run["steps_per_second"])


def speeds(runs: dict[str, Run]) -> str:
    return ", ".join(f"{who} {speed_of(runs[who]):.3f}/s" for who in ("one", "all"))


def keep(
    args: argparse.Namespace,
    group: ranks.Ranks,
    device: str,
    found: dict[str, dict[str, list[Run]]],
    apart: dict[str, list[dict[str, float]]],
) -> None:
    """Write what has been measured so far, and print what comes of it."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    summary = {}
    for kind, runs in found.items():
        one, shared = (
            statistics.median(map(speed_of, runs[who])) if runs[who] else None
            for who in ("one", "all")
        )
        if one and shared:
            worst = {key: max(each[key] for each in apart[kind]) for key in apart[kind][0]}
            summary[kind] = {"one": one, "all": shared, "times": shared / one, "apart": worst}
            print(f"{kind}: {one:.2f} to {shared:.2f} a second, {shared / one:.2f} times; {worst}")
    result = {
        "command": f"torchrun --standalone --nproc-per-node {group.world} "
        f"tools/bench_data_parallel.py --text {args.text.name} --calib {args.calib.name} "
        f"--windows {args.windows} --seqlen {args.seqlen} --steps {args.steps} "
        f"--batch {args.batch}",
        "date": datetime.date.today().isoformat(),
        "device": f"{group.world} of {name}",
        "ranks": group.world,
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "model": args.model,
        "windows": args.windows, "seqlen": args.seqlen, "batch": args.batch,
        "summary": summary, "runs": found, "apart": apart,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
