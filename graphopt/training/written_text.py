"""How much text the dense model writes for a training, beside the calibration text."""

from __future__ import annotations

import math

import torch

from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Program
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import evaluate
from graphopt.support.devices import free_bytes
from graphopt.support.ranks import here
from graphopt.training.schedule import Schedule

GENERATION_SHARE = 0.25
"""The share of a training's seconds in which the dense model generates text for it."""
WRITER_READY = 6.0
"""Seconds of writing from which on there is any: a model takes most of them to be made ready."""
EPOCHS = 4
"""How often a training of a given number of steps reads what the dense model writes."""


def windows_to_write(
    dense: Program,
    schedule: Schedule,
    seqlen: int,
    given: int,
    device: torch.device,
    left: float | None,
) -> tuple[int, float | None]:
    """Return how many windows a dense model writes, and in how many seconds at most.

    Args:
        seqlen: Tokens of a window.
        given: Windows of the calibration text that are learnt from.
        left: Seconds that are left of the training; None where its steps are counted instead.
    """
    seconds = math.inf if left is None else left * GENERATION_SHARE
    if seconds < WRITER_READY:
        return 0, None
    behind = dense.calls[find_blocks(dense)[-1].position].results[0]
    width = evaluate(infer_program(dense)[1][behind].shape[-1], {})
    # The dense model's hidden states of them are kept, in 16 bits.
    most = here().least(free_bytes(device) // 4 // (2 * seqlen * width))
    if left is not None:
        return most, seconds
    assert schedule.steps is not None
    wanted = schedule.steps * schedule.batch // EPOCHS - given
    return min(max(wanted, 0), most), None
