"""Where a training keeps what an interrupted compile goes on with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context
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
    key = json.dumps([FORMAT, asdict(options), what, context.seed, context.bos], sort_keys=True)
    paths = [call.path for call in program.calls]
    digest = hashlib.sha256(f"{key}\n{context.text}\n{paths}\n{program}".encode())
    return context.work / f"distil-{digest.hexdigest()[:16]}.pt"
