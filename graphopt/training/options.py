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
    """What passes that train are told.

    Attributes:
        seconds: Of the whole pass, at most; 150 where neither this nor `steps` is given.
        steps: Of training, at most.
        rate: Highest learning rate; by default 5e-4, and less for steps of under 8,192 tokens.
        batch: Windows of a step.
        seqlen: Tokens of a window.
        own_text: Windows that the dense model writes itself; see `Distiller.training_windows`.
        train: `all` trains weights whole, `low-rank` matrices by a term.
        rank: Of that term.
        patience: Stop after this many checks without a better held-out loss; 0 never stops.
    """

    seconds: Annotated[float, Field(ge=0)] | None = None
    steps: Annotated[int, Field(ge=0)] | None = None
    rate: Annotated[float, Field(gt=0)] | None = None
    batch: Annotated[int, Field(ge=1)] | PerDevice[int] = PerDevice(cpu=2, gpu=4)
    seqlen: Annotated[int, Field(ge=2)] | PerDevice[int] = PerDevice(cpu=256, gpu=2048)
    own_text: Annotated[int, Field(ge=0)] | None = None
    train: Literal["all", "low-rank"] = "all"
    rank: Annotated[int, Field(ge=1)] = 128
    patience: Annotated[int, Field(ge=0)] = 0
