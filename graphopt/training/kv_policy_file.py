"""A predictor trained for a model and written to a file, with what the training told."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.calibration.text import text_windows, window_length
from graphopt.errors import UsageError
from graphopt.execute.interpreter import Runner
from graphopt.ir.graph import Program
from graphopt.ir.kv_policies.checkpoint import PredictorCheckpoint
from graphopt.support.devices import AUTO, usable_device
from graphopt.support.per_device import PerDevice
from graphopt.support.progress import Progress, silent
from graphopt.training.kv_policy import KVTrainingResult, train_predictor
from graphopt.training.kv_traces import qualifying_layers

SEQLEN = PerDevice(cpu=4096, gpu=8192)
"""Tokens of a text, where none are given and the model takes as many."""

HISTORY = 64
"""Rows that a prediction is made of, as in the published form."""

RECORDED_STEPS = 1024
"""Steps of a text that are learnt from, at most: half of shorter texts."""


@dataclass(frozen=True)
class WrittenPredictor:
    """A predictor in a file.

    Attributes:
        path: The file.
        checkpoint: What is in it.
        result: What the training came to.
    """

    path: Path
    checkpoint: PredictorCheckpoint
    result: KVTrainingResult

    def figures(self) -> dict[str, Any]:
        """Return what is told as JSON."""
        return {
            "out": str(self.path),
            "bytes": self.path.stat().st_size,
            **self.checkpoint.about,
            "checks": self.result.checks,
            "seconds": self.result.seconds,
            "shortcoming": self.result.shortcoming,
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return what is told on a terminal, as (what, value)."""
        about, recalls = self.checkpoint.about, self.result.recalls
        rows = [
            ("out", f"{self.path}  ({self.path.stat().st_size:,} bytes)"),
            ("texts", f"{about['windows']} of {about['seqlen']:,} tokens, one of them held out"),
            ("steps", f"{self.result.steps:,}: {self.result.stopped}"),
        ]
        for fraction in recalls["ema"]:
            ema, own = recalls["ema"][fraction], recalls["predictor"][fraction]
            rows.append((f"recall at 1/{fraction}", f"{own:.4f}, and of ema {ema:.4f}"))
        return rows


def file_predictor(
    program: Program,
    text: str,
    path: Path,
    *,
    page: int,
    seqlen: int | None,
    windows: int,
    seconds: float,
    steps: int,
    seed: int,
    device: str = AUTO,
    progress: Progress = silent,
) -> WrittenPredictor:
    """Train a predictor for a program on a text, and write it to a file.

    The texts lie evenly over the whole; the last of them is held out.

    Args:
        program: Without KV states.
        windows: How many texts of `seqlen` tokens.
        seconds, steps: For training at most.

    Raises:
        UsageError: The program has KV states or no attention that qualifies, or there are too few
            texts or too short ones.
        PassError: The text is shorter than one window.
    """
    if program.states:
        raise UsageError(
            f"{program.name} has KV states already, and attention is recorded without.",
            "Give the model that it was compiled from, or compile it without insert-kv-cache.",
        )
    qualifying_layers(program)  # which is wrong before anything is run
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == AUTO else device
    place = usable_device(name)
    length = window_length(program, SEQLEN if seqlen is None else seqlen, place)
    all_windows = text_windows(program, text, length)
    if len(all_windows) < 2:
        raise UsageError(
            f"The text has {len(all_windows)} window of {length} tokens, and one is held out.",
            f"Give a longer text with --calib, or --seqlen {length // 2} or less.",
        )
    count = min(windows, len(all_windows))
    chosen = all_windows[torch.linspace(0, len(all_windows) - 1, count).long()]
    runner = Runner(program, device=place, keep_weights=False)
    result = train_predictor(
        runner, chosen, page=page, seed=seed, seconds=seconds, most_steps=steps,
        recorded_steps=min(RECORDED_STEPS, max(1, length // 2 - HISTORY)), progress=progress,
    )  # fmt: skip
    about = {
        "model": program.name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "windows": count,
        "seqlen": length,
        "seed": seed,
        "steps": result.steps,
        "stopped": result.stopped,
        "recall": {
            kind: {f"1/{fraction}": value for fraction, value in of.items()}
            for kind, of in result.recalls.items()
        },
    }
    checkpoint = PredictorCheckpoint(
        result.weights, page, result.group, history=HISTORY, channels=2, about=about
    )
    checkpoint.write(path)
    return WrittenPredictor(path, checkpoint, result)
