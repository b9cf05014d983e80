"""An exponential moving average of the probabilities that were read of a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.errors import UsageError
from graphopt.ir.kv_policies.moving_average import MovingAverage


@dataclass(frozen=True)
class Ema(MovingAverage):
    """Scores a page by a moving average of its probability over the steps that read it.

    State: that of `MovingAverage`. What the learned predictor is compared with.

    Attributes:
        alpha: What the newest probability counts, above 0 and at most 1.
    """

    kind: ClassVar[str] = "ema"

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise UsageError(
                f"A moving average with an alpha of {self.alpha}.",
                "Give a number above 0, and at most 1.",
            )

    @property
    def newest_share(self) -> float:
        return self.alpha

    @property
    def history(self) -> int:
        # A row this far back counts less than a thousandth of the newest with alpha at 0.2.
        return 32
