"""The options that all passes which train have in common.

Listing passes reads this module, so that it imports nothing that computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from graphopt.support.per_device import PerDevice


@dataclass
class TrainingOptions:
    """The options by which passes that train are told what to train, and for how long.

    Attributes:
        seconds: The pass takes at most so many seconds in all; 150 where neither this nor `steps`
            is given.
        steps: Training takes at most so many steps.
        rate: The highest learning rate, relative to the scale of each weight; by default 2.5e-3,
            and less for steps of under 8,192 tokens.
        batch: A step takes so many windows.
        seqlen: A window has so many tokens.
        generated_windows: The dense model writes so many windows itself, as self-generated
            calibration data; see `Distiller.training_windows`.
        train: `all` trains weights whole, `low-rank` trains matrices by a low-rank term.
        rank: The rank of that term.
        patience: Training stops after so many checks without a better held-out loss; 0 never stops.
    """

    seconds: Annotated[float, Field(ge=0)] | None = None
    steps: Annotated[int, Field(ge=0)] | None = None
    rate: Annotated[float, Field(gt=0)] | None = None
    batch: Annotated[int, Field(ge=1)] | PerDevice[int] = PerDevice(cpu=2, gpu=4)
    seqlen: Annotated[int, Field(ge=2)] | PerDevice[int] = PerDevice(cpu=256, gpu=2048)
    generated_windows: Annotated[int, Field(ge=0)] | None = None
    train: Literal["all", "low-rank"] = "all"
    rank: Annotated[int, Field(ge=1)] = 128
    patience: Annotated[int, Field(ge=0)] = 0
