"""How long and how fast to train, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from graphopt.training.step_memory import StepMemory


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: Training takes at most so many steps; None for as many as the seconds allow.
        seconds: Training takes at most so many seconds; None for as many as the steps take.
        rate: The highest learning rate. It falls to 0 by a cosine, over whichever of steps and
            seconds is nearer its end.
        warmup: The fraction of the schedule in which the rate rises from 0.
        batch: A step takes so many windows.
        betas: Adam's decay rates of the averages of gradients and of their squares.
        weight_decay: By what share of the rate a step moves parameters towards 0.
        patience: Training stops after so many checks without a better held-out loss; 0 never stops.
        reduce_on_plateau: Whether a rate that gets no further is reduced, from the best state on.
        memory: How a step is kept small.
    """

    steps: int | None = None
    seconds: float | None = None
    rate: float = 5e-4
    warmup: float = 0.02
    batch: int = 4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    patience: int = 0
    reduce_on_plateau: bool = True
    memory: StepMemory = field(default_factory=StepMemory)

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
        """Return the factor by which the highest rate is multiplied, from 0 to 1."""
        rise = 1.0 if done >= self.warmup else (done + 1e-3) / (self.warmup + 1e-3)
        return rise * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class TrainingResult:
    """The outcome of a training.

    Attributes:
        steps, seconds, tokens: How much was trained, in all runs of a training that was resumed.
        preparing: The seconds, among `seconds`, that compiling the step took.
        losses: (step, mean training loss since the entry before) pairs.
        checks: (step, loss on held-out windows) pairs, the first before any step.
        lr_decays: (step, highest rate from there on) pairs, where the one before got no further.
        stopped: Why it ended before its schedule did, or "".
        not_compiled: Why its step was not compiled though it would have been worth it, or "".
        made_smaller: How a step was made smaller because memory ran out, or "".
    """

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    preparing: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)
    lr_decays: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = ""
    not_compiled: str = ""
    made_smaller: str = ""
