"""Measure pruning in depth and recovery: what is left of the quality, after how many seconds.

    python tools/bench_depth.py recover --calib FILE --text FILE [--recipe RECIPE] [--device cuda]
    python tools/bench_depth.py scores --calib FILE    # one walk beside a run for each candidate
    python tools/bench_depth.py onnx --calib FILE      # decoding, pruned beside dense
    python tools/bench_depth.py shape --device cuda    # macro influence of a random Llama-7B

Each part is kept in benchmarks/depth.json beside what other parts, and other devices, gave.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import keep, random_llama, run_recipes

import graphopt as go
from graphopt.backends.onnx_artifact import OnnxArtifactModel
from graphopt.calibration.scores import PruningUnit, final_hidden, score_units, units_of
from graphopt.calibration.text import pick, text_windows
from graphopt.capture import capture
from graphopt.evaluate.perplexity import read_text
from graphopt.execute.interpreter import complete_inputs, resident
from graphopt.ir.blocks import find_blocks, remove_blocks
from graphopt.ir.graph import Program

ROOT = Path(__file__).resolve().parent.parent
PRUNE = "prune-blocks{ratio=0.25}"
MIDDLE = "prune-blocks{remove=[12,13,14,15,16,17,18,26],windows=1}"
RECIPES = {
    "cuda": (
        PRUNE,
        f"{PRUNE},fuse-blocks{{seconds=50}}",
        f"{PRUNE},fuse-blocks{{seconds=140}}",
        f"{PRUNE},fuse-blocks{{mode=local,seconds=140}}",
        # What the parts of the second one contribute, on the blocks that it chooses.
        f"{MIDDLE},fuse-blocks{{steps=0}}",
        f"{MIDDLE},fuse-blocks{{seconds=50}}",
        f"{MIDDLE},fuse-blocks{{seconds=50,warm_start=true}}",
        f"{MIDDLE},fuse-blocks{{seconds=50,generated_windows=0}}",
        # The paper's way, with its choice of blocks.
        "prune-blocks{ratio=0.25,score=mi,reference=current},"
        "fuse-blocks{mode=published,seconds=140,ablations=true}",
    ),
    "cpu": (PRUNE, f"{PRUNE},fuse-blocks{{seconds=470}}"),
}


def recover(options: argparse.Namespace) -> dict[str, Any]:
    """Run recipes on the demo."""

    def made(program: Program) -> None:
        if options.keep is not None:
            go.emit(program, options.keep, emit=("hf",), force=True)

    device = torch.device(options.device)
    return run_recipes(
        options.recipe or RECIPES[device.type], calib=options.calib, text=options.text,
        device=device, windows=options.windows, piqa=options.piqa, seed=options.seed,
        save=lambda found: save(options, found), made=made,
    )  # fmt: skip


def scores(options: argparse.Namespace) -> dict[str, Any]:
    """Time one walk over all candidates, and a run of the model for each; compare the scores."""
    device = torch.device(options.device)
    program = resident(capture("demo"), torch.float32, device)
    windows = pick(text_windows(program, read_text(options.calib), 256), 2, 0)
    units = units_of(program, ("block",))
    times: dict[str, list[float]] = {"one walk": [], "naive": []}
    for _ in range(3):
        started = time.perf_counter()
        together = score_units(program, units, windows, device=device).values
        times["one walk"].append(time.perf_counter() - started)
        started = time.perf_counter()
        base = final_hidden(program, windows, device=device)
        alone = {unit: naive(program, unit, windows, base, device) for unit in units}
        times["naive"].append(time.perf_counter() - started)
    largest = max(abs(together[unit] - alone[unit]) for unit in units)
    medians = {name: statistics.median(found) for name, found in times.items()}
    share = medians["one walk"] / medians["naive"]
    print(f"one walk takes {share:.2f} of the naive time; largest difference {largest:.1e}")
    return {"seconds": times, "share": share, "largest_difference": largest, "blocks": len(units)}


def naive(program: Any, unit: PruningUnit, windows: Any, base: Any, device: torch.device) -> float:
    """Return a block's macro influence by running the model without it."""
    pruned = program.copy()
    remove_blocks(pruned, [unit.block])
    (ours,) = final_hidden(pruned, windows, device=device)
    cosine = torch.nn.functional.cosine_similarity(ours.double(), base[0].double(), dim=-1)
    return float((1 - cosine).mean())


def onnx(options: argparse.Namespace) -> dict[str, Any]:
    """Decode with the dense and the pruned ONNX graph in turns."""
    with tempfile.TemporaryDirectory(prefix="bench-depth-") as work:
        models = {}
        for name, passes in (("dense", ""), ("pruned", f"{MIDDLE},")):
            recipe = f"{passes}{go.Pipeline.default()}"
            program, _ = go.Pipeline.parse(recipe).run(
                capture("demo"), go.RunOptions(calib=options.calib, verify=False)
            )
            go.emit(program, Path(work) / name, emit=("onnx",))
            models[name] = OnnxArtifactModel(Path(work) / name / "onnx")
        speeds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(6):
            for name in list(models)[:: -1 if turn % 2 else 1]:
                speeds[name].append(decode_speed(models[name]))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    faster = medians["pruned"] / medians["dense"]
    print(f"pruned decodes {faster:.2f} times faster: {medians}")
    return {"tokens_per_second": speeds, "times_faster": faster}


def decode_speed(model: OnnxArtifactModel, prompt: int = 64, count: int = 48) -> float:
    ids = torch.arange(prompt)[None] + 1000
    logits, cache = model.step(complete_inputs({"input_ids": ids}), model.start(1))
    started = time.perf_counter()
    for done in range(count):
        token = logits[:, -1:].argmax(-1)
        logits, cache = model.step(complete_inputs({"input_ids": token}, prompt + done), cache)
    return count / (time.perf_counter() - started)


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """Score the blocks of a 16-bit Llama-7B with random weights over 32 windows of 2,048."""
    device = torch.device(options.device)
    program = random_llama(device)
    windows = torch.randint(0, 32000, (32, 2048), generator=torch.Generator().manual_seed(0))
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    found = score_units(
        program, units_of(program, ("block",)), windows, device=device, dtype=torch.bfloat16
    )
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated()
    count = len(find_blocks(program))
    print(f"macro influence of {count} blocks: {seconds:.1f} s, {peak / 1e9:.1f} GB")
    return {"seconds": seconds, "peak_bytes": peak, "block_calls": found.calls}


PARTS = {"recover": recover, "scores": scores, "onnx": onnx, "shape": shape}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--calib", type=Path, help="calibration text")
    parser.add_argument("--text", type=Path, help="evaluation text")
    parser.add_argument("--piqa", type=Path, help="questions, as for graphopt eval --piqa")
    parser.add_argument("--windows", type=int, help="of the evaluation text; all by default")
    parser.add_argument("--recipe", action="append", help="instead of those for the device")
    parser.add_argument("--keep", type=Path, help="folder for the last result, as a checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "depth.json")
    options = parser.parse_args()
    if options.part != "shape" and options.calib is None:
        parser.error("give a calibration text with --calib")
    if options.part == "recover" and options.text is None:
        parser.error("give an evaluation text with --text")
    save(options, PARTS[options.part](options))


def save(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    command = ["python tools/bench_depth.py", options.part, "--device", options.device]
    command += [
        f"--{option} {getattr(options, option).name}"
        for option in ("calib", "text", "piqa")
        if getattr(options, option) is not None
    ]
    for option in ("windows", "seed"):
        if getattr(options, option):
            command.append(f"--{option} {getattr(options, option)}")
    command += [f"--recipe '{recipe}'" for recipe in options.recipe or ()]
    keep(options.out, options.part, command, torch.device(options.device), found)


if __name__ == "__main__":
    main()
