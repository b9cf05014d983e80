"""Measure what passes do to a small model that sees, calibrated on text and on pictures.

    python tools/bench_vision.py [--seed N] [--model FOLDER] [--steps N] [--removed K]

A LLaVA is trained on drawn shapes and their captions (`tools/drawn_shapes.py`, some minutes on a
CPU); `--model` names a folder that one is written to, or lies in. Then blocks are taken out: every
set of so many, or as many random ones as `--draws` says, and those that text alone chooses, and
text and pictures; and what is left is trained, with pictures and without, by `fuse-blocks` as it
is and as FuseGPT is published. Perplexity of captions is measured on other pictures, given them,
and on other captions alone. Results are kept in benchmarks/vision.json, for each seed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from drawn_shapes import train, write_pictures, write_text
from measure import keep
from results import given_words

import graphopt as go
from graphopt.evaluate.perplexity import perplexity, read_text
from graphopt.execute.language_model import ProgramModel
from graphopt.ir.blocks import block_name, find_blocks
from graphopt.ir.graph import Program
from graphopt.passes.prune_blocks.record import PrunedBlocks
from graphopt.vision.answers import answer_perplexity
from graphopt.vision.picture_rows import read_picture_rows
from graphopt.vision.processor import Processor
from graphopt.vision.sighted_model import SightedModel

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 64
CALIBRATED = {"text": False, "text and pictures": True}
"""What passes learn from, and whether pictures are in it."""

CHOICES = {"kl": "", "mi": ",score=mi,reference=current"}
"""How blocks are chosen: as `prune-blocks` does by default, and as FuseGPT does."""


@dataclass(frozen=True)
class Try:
    """A recipe, and what it is in the table.

    Attributes:
        kind: Its row: `removed`, `chosen`, `trained` or `trained at random`.
        how: Score of a choice, or mode of a training.
        learnt_from: A key of `CALIBRATED`.
    """

    kind: str
    how: str
    learnt_from: str
    recipe: str


def measured(program: Program, rows: Path, text: Path) -> dict[str, float]:
    """Return the perplexity of captions given their pictures, and of captions alone."""
    processor = Processor(program)
    given = answer_perplexity(SightedModel(program), processor, read_picture_rows(rows))
    alone = perplexity(
        ProgramModel(program), processor.tokenizer, read_text(text), seqlen=WINDOW
    )  # fmt: skip
    return {"pictures": given.perplexity, "text": alone.perplexity}


def removal(numbers: Sequence[int]) -> str:
    """Return the pass that takes out these blocks."""
    return f"prune-blocks{{remove=[{','.join(map(str, numbers))}],seqlen={WINDOW}}}"


def drawn_sets(blocks: int, removed: int, draws: int) -> list[tuple[int, ...]]:
    """Return sets of blocks in random order: all that there are, or `draws` of them."""
    draw = random.Random(0)
    if math.comb(blocks, removed) <= draws:
        every = list(itertools.combinations(range(blocks), removed))
        draw.shuffle(every)
        return every
    return [tuple(sorted(draw.sample(range(blocks), removed))) for _ in range(draws)]


class Bench:
    """Runs recipes on one model.

    Args:
        options: Of the command line.
        model: The model's folder.
        folder: Where pictures and texts are written.
    """

    def __init__(self, options: argparse.Namespace, model: Path, folder: Path) -> None:
        self.options, self.folder = options, folder
        write_pictures(folder / "calib", options.pictures, 1)
        write_pictures(folder / "held-out", options.held_out, 2)
        write_text(folder / "calib.txt", 8 * options.pictures, 3)
        write_text(folder / "held-out.txt", 4 * options.held_out, 4)
        self.held_out = (folder / "held-out" / "rows.jsonl", folder / "held-out.txt")
        self.program = go.capture(str(model))
        self.names = [block_name(self.program, block) for block in find_blocks(self.program)]
        self.whole = measured(self.program, *self.held_out)
        self.runs: list[dict[str, Any]] = []

    def run(self, one: Try) -> list[int]:
        """Run a recipe and measure what it makes; return the numbers of the blocks it removed."""
        settings = go.RunOptions(
            calib=self.folder / "calib.txt",
            calib_images=self.folder / "calib" if CALIBRATED[one.learnt_from] else None,
            verify=False, seed=self.options.seed,
        )  # fmt: skip
        started = time.perf_counter()
        made, report = go.Pipeline.parse(one.recipe).run(self.program, settings)
        seconds = time.perf_counter() - started
        (record,) = (e.record for e in report.passes if isinstance(e.record, PrunedBlocks))
        removed = sorted(self.names.index(name) for name in record.removed)
        figures = {**vars(one), "removed": removed, "seconds": seconds}
        figures |= measured(made, *self.held_out)
        self.runs.append(figures)
        print(
            f"{one.kind}, {one.how}, {one.learnt_from}: {removed} {figures['pictures']:.3f} "
            f"{figures['text']:.3f}",
            flush=True,
        )
        return removed

    def all(self) -> None:
        """Run every removal, choice and training."""
        options = self.options
        sets = drawn_sets(len(self.names), options.removed, options.draws)
        for numbers in sets:
            self.run(Try("removed", "at random", "text", removal(numbers)))
        found: dict[str, list[int]] = {}
        for (score, more), source in itertools.product(CHOICES.items(), CALIBRATED):
            chosen = f"prune-blocks{{blocks={options.removed},windows=16,seqlen={WINDOW}{more}}}"
            found[f"{score} {source}"] = self.run(Try("chosen", score, source, chosen))
        best = found["kl text and pictures"]
        for one in self._trainings(best):
            self.run(one)
        for numbers in sets[: options.trained_draws]:
            fuse = f"{removal(numbers)},{self._fuse('distil')}"
            self.run(Try("trained at random", "distil", "text and pictures", fuse))

    def _fuse(self, mode: str, more: str = "") -> str:
        steps = self.options.fuse_steps
        return f"fuse-blocks{{mode={mode}{more},steps={steps},seqlen={WINDOW},batch=8}}"

    def _trainings(self, numbers: Sequence[int]) -> Iterator[Try]:
        """Yield the trainings of what is left without some blocks."""
        for source in CALIBRATED:
            yield Try("trained", "distil", source, f"{removal(numbers)},{self._fuse('distil')}")
        for source in CALIBRATED:
            fuse = self._fuse("published")
            yield Try("trained", "published", source, f"{removal(numbers)},{fuse}")
        fuse = self._fuse("published", ",donor=random")
        source = "text and pictures"
        yield Try("trained", "published, random donor", source, f"{removal(numbers)},{fuse}")


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train the model if there is none, and run every recipe."""
    found: dict[str, Any] = {
        "removed": options.removed, "fuse_steps": options.fuse_steps, "seed": options.seed,
    }  # fmt: skip
    model = folder / "model" if options.model is None else options.model
    if not model.exists():
        started = time.perf_counter()
        found["losses"] = train(model, steps=options.steps, seed=options.seed)
        found["training_seconds"] = time.perf_counter() - started
    bench = Bench(options, model, folder)
    print("whole", bench.whole, flush=True)
    bench.all()
    return found | {"blocks": len(bench.names), "whole": bench.whole, "runs": bench.runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder that is written, or was")
    parser.add_argument("--steps", type=int, default=600, help="of training the model")
    parser.add_argument("--removed", type=int, default=2, help="blocks to take out")
    parser.add_argument("--fuse-steps", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=96, help="to calibrate on")
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--draws", type=int, default=28, help="of random removal")
    parser.add_argument("--trained-draws", type=int, default=5, help="of which so many are trained")
    parser.add_argument("--seed", type=int, default=0, help="of the model and of the passes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "vision.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(options, Path(folder))
    command = ["python", "tools/bench_vision.py", given_words()]
    keep(options.out, f"shapes {options.seed}", command, torch.device("cpu"), found)


if __name__ == "__main__":
    main()
