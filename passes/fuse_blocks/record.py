"""What `fuse-blocks` tells: what training took back, and what the warm start and ablations gave."""

from __future__ import annotations

from html import escape

import pydantic
from pydantic import Field

from graphopt.calibration.reconstruction import Reconstruction
from graphopt.report.pictures import (
    figure,
    halves,
    perplexity_rows,
    reconstruction_sentences,
    removed_in_order,
    seconds_rows,
    sentences,
    table,
)
from graphopt.report.record import Figure, told_in_a_line
from graphopt.training.record import TrainingRecord, training_pictures


class Ablation(pydantic.BaseModel):
    """What the first fusion gave with one donor."""

    model_config = pydantic.ConfigDict(extra="forbid")

    donor: str
    loss: Figure
    perplexity: Figure


class FusedBlocks(TrainingRecord):
    """What training took back of what was removed.

    Attributes:
        order: Numbers of the blocks that the published mode removed, first to last.
        reconstructions: What the warm start made of each projection.
        ablations: The first fusion with every donor, where it was asked for.
    """

    order: list[int] = Field(default_factory=list)
    reconstructions: list[Reconstruction] = Field(default_factory=list)
    ablations: list[Ablation] = Field(default_factory=list)

    def line(self) -> str:
        return told_in_a_line([str(number) for number in self.order], self.perplexity)

    def card(self) -> str:
        figures = (
            perplexity_rows(self.perplexity), seconds_rows(self.seconds), _table(self.ablations)
        )  # fmt: skip
        return "".join(
            (
                removed_in_order([str(number) for number in self.order]),
                halves(figures),
                training_pictures(self.training),
                sentences(reconstruction_sentences(self.reconstructions) + self.own_sentences()),
            )
        )


def _table(ablations: list[Ablation]) -> str:
    if not ablations:
        return ""
    rows = [
        (escape(ablation.donor), figure(ablation.loss, 4), figure(ablation.perplexity, 4))
        for ablation in ablations
    ]
    headings = ("donor", "held-out loss", "perplexity")
    note = "The same training with another donor."
    return f'<h3>Ablations</h3><p class="dim">{note}</p>{table(headings, rows, headings[1:])}'
