"""What a pass that trains tells, and how the report shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Annotated

import pydantic

from graphopt.report.pictures import (
    axis,
    curves,
    figure,
    halves,
    legend,
    perplexity_rows,
    seconds_rows,
    sentences,
)
from graphopt.report.record import Figure, Record, Seconds, Step, told_in_a_line
from graphopt.support.quantities import counted

if TYPE_CHECKING:
    from graphopt.training.schedule import TrainingResult

LEAST_GAIN = 0.005
"""The share by which a training has to lower perplexity: half a percent may be chance."""

Count = Annotated[int, pydantic.Field(ge=0)]
Curve = list[tuple[int, Figure]]
"""(step, value) pairs."""


class TrainedPart(pydantic.BaseModel):
    """The outcome of one training; see `graphopt.training.schedule.TrainingResult`."""

    model_config = pydantic.ConfigDict(extra="forbid", from_attributes=True)

    part: str
    steps: Count
    seconds: Seconds
    tokens: Count
    preparing: Seconds
    losses: Curve
    checks: Curve
    lr_decays: Curve
    stopped: str
    not_compiled: str
    made_smaller: str = ""

    @classmethod
    def of(cls, part: str, tuned: TrainingResult) -> TrainedPart:
        """Return what the record says of one training, of some part of a program."""
        return cls(part=part, **asdict(tuned))


class TrainingRecord(Record):
    """What every pass that trains tells.

    Attributes:
        seconds: By what they were spent on; `all` is the whole pass.
        perplexity: On held-out windows, along the way.
        training: An entry a training, in order.
        generated_windows: Windows that the dense model wrote to learn from; None for none.
        compared_tokens: Tokens of a large vocabulary on which distributions were compared; None
            for all.
        batches: How many windows are taken at once, as predicted to fit the memory of a GPU, a
            sentence each.
    """

    seconds: dict[str, Seconds] = pydantic.Field(default_factory=dict)
    perplexity: list[Step] = pydantic.Field(default_factory=list)
    training: list[TrainedPart] = pydantic.Field(default_factory=list)
    generated_windows: Count | None = None
    compared_tokens: Count | None = None
    batches: list[str] = pydantic.Field(default_factory=list)

    def shortcoming(self, seconds: float) -> str | None:
        """Return what has to be known of a training that was of no use; None of one that was.

        Args:
            seconds: How many it was given.
        """
        steps = sum(part.steps for part in self.training)
        if not steps:
            spent = ", ".join(f"{what} {value:.0f} s" for what, value in self.seconds.items())
            return (
                f"NO STEP was made in {seconds:g} seconds ({spent}): give more seconds, or a "
                "shorter seqlen or batch"
            )
        # The whole model, what the pass was given, what it did on the way, and what it made.
        _, given, *_, trained = (
            math.inf if step.value is None else step.value for step in self.perplexity
        )
        if trained <= (1 - LEAST_GAIN) * given:
            return None
        return (
            f"HARDLY ANY GAIN in {counted(steps, 'step')}: held-out perplexity went from "
            f"{given:.4g} to {trained:.4g}; give more seconds, or leave the pass out"
        )

    def line(self) -> str:
        return told_in_a_line([], self.perplexity)

    def card(self) -> str:
        return "".join(
            (
                halves([perplexity_rows(self.perplexity), seconds_rows(self.seconds)]),
                training_pictures(self.training),
                sentences(self.own_sentences()),
            )
        )

    def own_sentences(self) -> list[str]:
        """Return what is told in a sentence each; here, on the text and on the vocabulary."""
        facts: list[str] = []
        if self.generated_windows:
            facts.append(
                f"{self.generated_windows:,.0f} windows of text were written by the dense model."
            )
        if self.compared_tokens:
            facts.append(
                f"Distributions were compared over {self.compared_tokens:,.0f} tokens of the "
                "vocabulary: the text's most frequent ones and those that the dense model expects."
            )
        return facts + self.batches


def training_pictures(parts: Sequence[TrainedPart]) -> str:
    """Return a small picture of losses over steps for each training."""
    if not parts:
        return ""
    pictures = "".join(map(_training, parts))
    colours = legend([("bg-time", "training loss"), ("ffn", "held-out check")])
    return f'<h3>Training</h3><div class="pictures">{pictures}</div>{colours}'


def _training(trained: TrainedPart) -> str:
    losses, checks = _drawable(trained.losses), _drawable(trained.checks)
    known = [value for _, value in (*losses, *checks)]
    last = max((step for step, _ in (*losses, *checks)), default=0)
    picture = ""
    if last > 0:
        lowest, highest = min(known), max(known)
        span = math.log(highest / lowest) or 1.0
        scaled = [
            (style, [(step, math.log(value / lowest) / span) for step, value in points])
            for style, points in (("time", losses), ("ffn", checks))
        ]
        ends = f"loss {figure(lowest, 3)} to {figure(highest, 3)}, logarithmic"
        picture = curves(scaled, last, "loss over steps", ends)
        picture += axis("step 0", ends, f"{last:,.0f}")
    facts = [counted(trained.steps, "step"), counted(trained.tokens, "token")]
    facts.append(f"{trained.seconds:.1f} s")
    if len(checks) > 1:
        best = min(value for _, value in checks)
        facts.append(f"held-out loss {figure(checks[0][1], 3)} → {figure(best, 3)}")
    for step, rate in _drawable(trained.lr_decays):
        facts.append(
            f"rate at most {rate:.1e} from step {step:,.0f} on, as the one before got no further"
        )
    if trained.stopped:
        facts.append(f"stopped early: {trained.stopped}")
    return (
        f'<div><b>{escape(trained.part)}</b><p class="dim">{escape(", ".join(facts))}</p>'
        f"{picture}</div>"
    )


def _drawable(points: Curve) -> list[tuple[int, float]]:
    """Return the points that have a place on a logarithmic scale."""
    return [(step, value) for step, value in points if value is not None and value > 0]
