"""The options that all passes which train have in common.

Listing passes reads this module, so that it imports nothing that computes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from pydantic import Field

from graphopt.errors import UsageError
from graphopt.support.per_device import PerDevice

DEFAULT_SECONDS = 150.0
"""How long a pass trains where neither seconds nor steps are given."""


@dataclass
class TrainingOptions:
    """The options by which passes that train are told what to train, and for how long.

    Options:
        seconds: How long the pass may take in all; 150 where neither this nor steps is given.
        steps: How many steps training takes at most.
        rate: The highest learning rate, relative to the scale of each weight; by default 2.5e-3,
            and less for steps of under 8,192 tokens.
        batch: How many windows a step takes.
        seqlen: Tokens of a window.
        generated_windows: How many windows the dense model writes itself, as self-generated
            calibration data; by default none on a CPU, and on a GPU what a quarter of the seconds
            allows (none in under 24 seconds), or of the steps reads.
        train: Whether weights are trained whole (all), or matrices by a low-rank term.
        rank: The rank of that term.
        patience: After how many checks without a lower held-out loss training stops; 0 for never.
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

    def refuse_low_rank(self, trained: str) -> None:
        """Refuse to train by low-rank terms, for passes that train something else.

        Args:
            trained: Which pass trains what, as in `tune-codes trains scales and codes`.

        Raises:
            UsageError: `train` or `rank` is not at its default.
        """
        for option in fields(TrainingOptions):
            value = getattr(self, option.name)
            if option.name in ("train", "rank") and value != option.default:
                raise UsageError(
                    f"{option.name}={value} is for low-rank terms, and {trained}.",
                    f"Leave {option.name} out.",
                )
