"""Where a training keeps what an interrupted compile goes on with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context
from graphopt.storage.snapshot import resuming_from
from graphopt.support.ranks import here
from graphopt.training.options import TrainingOptions

FORMAT = 3
"""The format of the files: those of another are not read."""


def kept_file(
    what: str, options: TrainingOptions, program: Program, context: Context
) -> Path | None:
    """Return the file that keeps something between two runs of one compile.

    Its name hangs on everything that what it holds comes from, so that no other run reads it.

    Args:
        what: What it keeps.
        program: The program that is trained, as the pass was given it.

    Returns:
        None where the compile keeps nothing.
    """
    if context.work is None:
        return None
    settings = [FORMAT, asdict(options), what, context.seed, context.bos, context.origin]
    key = json.dumps(settings, sort_keys=True)
    paths = [call.path for call in program.calls]
    digest = hashlib.sha256(f"{key}\n{context.text}\n{paths}\n{program}".encode())
    return context.work / f"distil-{digest.hexdigest()[:16]}.pt"


def keep_state(path: Path | None, state: dict[str, Any]) -> None:
    """Write tensors and plain data to a file of `kept_file`, whole or not at all."""
    if path is None or not here().first:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    torch.save(state, fresh)
    fresh.replace(path)


def kept_state(path: Path | None) -> dict[str, Any] | None:
    """Return what `keep_state` wrote; None where it wrote nothing.

    Raises:
        SourceError: The file cannot be read.
    """
    if path is None or not here().made_by_first(path.is_file):
        return None
    with resuming_from(path):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
