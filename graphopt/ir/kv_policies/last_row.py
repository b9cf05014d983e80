"""The pages of the highest probability when they were last read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.ir.kv_policies.moving_average import MovingAverage


@dataclass(frozen=True)
class LastRow(MovingAverage):
    """Takes that attention repeats itself: a page's score is its probability when it was last read.

    State: that of `MovingAverage`.
    """

    kind: ClassVar[str] = "last-row"

    @property
    def newest_share(self) -> float:
        return 1.0

    @property
    def history(self) -> int:
        return 1
