"""What a training will take, for `--dry-run`."""

from __future__ import annotations

import torch

from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Forecast
from graphopt.support.per_device import on_device
from graphopt.training.options import DEFAULT_SECONDS, TrainingOptions

STEP_RUNS = 4
"""A step runs the dense model, the trained one, and back through it, which is twice as much."""

BYTES_PER_PARAMETER = 20
"""Of the dense model 4, and of the trained one 16: weights, gradients and two averages in fp32."""


def forecast_training(
    options: TrainingOptions, program: Program, device: torch.device, what: str
) -> Forecast:
    """Say what training a program will take.

    Args:
        what: What is trained, as a clause: `trains ...`.
    """
    tokens = 0.0
    seconds = options.seconds
    if options.steps is not None:
        window = on_device(options.batch, device) * on_device(options.seqlen, device)
        tokens = float(STEP_RUNS * options.steps * window)
        what += f" for {options.steps} steps" + (f" or {seconds:g} s" if seconds else "")
    else:
        seconds = DEFAULT_SECONDS if seconds is None else seconds
        what += f" for {seconds:g} s"
    return Forecast(
        what,
        tokens=tokens,
        seconds=0.0 if tokens else seconds or 0.0,
        memory=BYTES_PER_PARAMETER * program.parameter_count(),
    )
