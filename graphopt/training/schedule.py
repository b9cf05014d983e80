"""How long and how fast to train, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: Most steps; None for as many as the seconds allow.
        seconds: Most seconds; None for as many as the steps take.
        rate: Highest learning rate. It falls to 0 by a cosine, over whichever of steps and
            seconds is nearer its end.
        warm_up: Of the schedule, in which the rate rises from 0.
        batch: Windows of a step.
        betas: Of Adam.
        patience: Stop after this many checks without a better held-out loss; 0 never stops.
        reduce_on_plateau: Whether a rate that gets no further is lowered, from the best state on.
    """

    steps: int | None = None
    seconds: float | None = None
    rate: float = 5e-4
    warm_up: float = 0.02
    batch: int = 4
    betas: tuple[float, float] = (0.9, 0.95)
    patience: int = 0
    reduce_on_plateau: bool = True

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise ValueError("a schedule needs steps or seconds")

    def done(self, step: int, elapsed: float) -> float:
        """Return how far a training is, from 0 to 1."""
        parts = [0.0]
        if self.steps is not None:
            parts.append(step / self.steps if self.steps else 1.0)
        if self.seconds is not None:
            parts.append(elapsed / self.seconds if self.seconds else 1.0)
        return min(max(parts), 1.0)

    def factor(self, done: float) -> float:
        """Return what the learning rate is times."""
        rise = 1.0 if done >= self.warm_up else (done + 1e-3) / (self.warm_up + 1e-3)
        return rise * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Tuned:
    """What a training did.

    Attributes:
        steps, seconds, tokens: Of all its pieces together.
        preparing: Of the seconds, those that compiling the step took.
        losses: (step, mean training loss since the entry before) pairs.
        checks: (step, loss on held-out windows) pairs, the first before any step.
        lowered: (step, highest rate from there on) pairs, where the one before got no further.
        stopped: Why it ended before its schedule did, or "".
        not_compiled: Why its step was not compiled though it would have been worth it, or "".
    """

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    preparing: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)
    lowered: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = ""
    not_compiled: str = ""
