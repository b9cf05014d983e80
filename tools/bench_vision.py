"""Measure what passes do to a small model that sees, calibrated on text and on pictures.

    python tools/bench_vision.py [--model FOLDER] [--steps N] [--removed K] [--seeds 5]

A LLaVA is trained on drawn shapes and their captions (`tools/drawn_shapes.py`, some minutes on a
CPU), or `--model` names a folder that one was written to. Then blocks are taken out: random ones,
those that text alone chooses, and those that text and pictures choose; and what is left is
trained, with pictures and without. Perplexity of captions is measured on other pictures, given
them, and on other captions alone. Results are kept in benchmarks/vision.json.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from drawn_shapes import train, write_pictures, write_text
from measure import keep

import graphopt as go
from graphopt.evaluate.perplexity import perplexity, read_text
from graphopt.execute.language_model import ProgramModel
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Program
from graphopt.vision.answers import answer_perplexity
from graphopt.vision.picture_rows import read_picture_rows
from graphopt.vision.processor import Processor
from graphopt.vision.sighted_model import SightedModel

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 64


def measured(program: Program, rows: Path, text: Path) -> dict[str, float]:
    """Return the perplexity of captions given their pictures, and of captions alone."""
    processor = Processor(program)
    given = answer_perplexity(SightedModel(program), processor, read_picture_rows(rows))
    alone = perplexity(
        ProgramModel(program), processor.tokenizer, read_text(text), seqlen=WINDOW
    )  # fmt: skip
    return {"pictures": given.perplexity, "text": alone.perplexity}


def recipes(removed: int, steps: int, blocks: int, seeds: int) -> list[tuple[str, str, bool]]:
    """Return (what it is called, the recipe, whether it is calibrated on pictures too)."""
    chosen = f"prune-blocks{{blocks={removed},windows=8,seqlen={WINDOW}}}"
    fuse = f"fuse-blocks{{steps={steps},seqlen={WINDOW},batch=8}}"
    found = []
    for seed in range(seeds):
        numbers = sorted(random.Random(seed).sample(range(blocks), removed))
        listed = f"prune-blocks{{remove=[{','.join(map(str, numbers))}],seqlen={WINDOW}}}"
        found.append((f"random {seed}", listed, False))
    found += [("chosen by text", chosen, False), ("chosen by text and pictures", chosen, True)]
    for name, pictures in (("text", False), ("text and pictures", True)):
        found.append((f"chosen and trained by {name}", f"{chosen},{fuse}", pictures))
    return found


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train the model if there is none, and run every recipe."""
    found: dict[str, Any] = {"removed": options.removed, "fuse_steps": options.fuse_steps}
    model = options.model
    if model is None:
        model, started = folder / "model", time.perf_counter()
        found["losses"] = train(model, steps=options.steps, seed=options.seed)
        found["training_seconds"] = time.perf_counter() - started
    write_pictures(folder / "calib", options.pictures, 1)
    write_pictures(folder / "held-out", options.held_out, 2)
    write_text(folder / "calib.txt", 8 * options.pictures, 3)
    write_text(folder / "held-out.txt", 4 * options.held_out, 4)
    program = go.capture(str(model))
    held_out = (folder / "held-out" / "rows.jsonl", folder / "held-out.txt")
    blocks = len(find_blocks(program))
    found["blocks"], found["whole"] = blocks, measured(program, *held_out)
    print("whole", found["whole"], flush=True)
    found["runs"] = []
    for name, recipe, pictures in recipes(
        options.removed, options.fuse_steps, blocks, options.seeds
    ):
        settings = go.RunOptions(
            calib=folder / "calib.txt", calib_images=folder / "calib" if pictures else None,
            verify=False, seed=options.seed,
        )  # fmt: skip
        started = time.perf_counter()
        made, _ = go.Pipeline.parse(recipe).run(program, settings)
        seconds = time.perf_counter() - started
        figures = {"name": name, "recipe": recipe, "seconds": seconds, **measured(made, *held_out)}
        found["runs"].append(figures)
        print(f"{name}: {figures['pictures']:.3f} {figures['text']:.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder that drawn_shapes.train wrote")
    parser.add_argument("--steps", type=int, default=600, help="of training the model")
    parser.add_argument("--removed", type=int, default=2, help="blocks to take out")
    parser.add_argument("--fuse-steps", type=int, default=60)
    parser.add_argument("--pictures", type=int, default=96, help="to calibrate on")
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=5, help="of random removal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "vision.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(options, Path(folder))
    command = ["python", "tools/bench_vision.py", *sys.argv[1:]]
    keep(options.out, "shapes", command, torch.device("cpu"), found)


if __name__ == "__main__":
    main()
