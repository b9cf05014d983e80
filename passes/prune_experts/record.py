"""What `prune-experts` tells: which experts are left, by which scores, and what it costs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from pydantic import Field

from graphopt.calibration.reconstruction import Reconstruction
from graphopt.report.pictures import (
    axis,
    curves,
    figure,
    halves,
    legend,
    perplexity_rows,
    reconstruction_sentences,
    seconds_rows,
    sentences,
)
from graphopt.report.record import Figure, Record, Seconds, Step, told_in_a_line


@dataclass(frozen=True)
class PrunedMixture:
    """What became of one mixture.

    Attributes:
        where: The block.
        kept: The experts that are left, by their numbers before.
        saliency: The score of each expert before; empty where none was measured.
        load: Share of the calibration tokens that ran each.
        merged_into: For every expert that was merged, by its number, the one it went into.
        likeness: For every one of these, the cosine of the outputs of the two.
    """

    where: str
    kept: list[int]
    saliency: list[float]
    load: list[float]
    merged_into: dict[int, int]
    likeness: dict[int, float]


class PrunedExperts(Record):
    """What was left out.

    Attributes:
        experts: How many experts mixtures had, and how many are left.
        mixtures: What became of each.
        score: What was scored by.
        tried: By each score that was tried the perplexity of the model.
        reconstructions: What reconstruction made of the mixtures' outputs, relative squared errors.
        perplexity: On held-out windows, before and after, and of the steps between.
        random: The perplexity of draws of random experts in the place of those that were chosen.
        parameters: The number of parameters, before and after.
        seconds: The seconds of the pass, by what they were spent on.
    """

    experts: tuple[int, int]
    mixtures: list[PrunedMixture]
    score: str
    tried: dict[str, Figure] = Field(default_factory=dict)
    reconstructions: list[Reconstruction] = Field(default_factory=list)
    perplexity: list[Step] = Field(default_factory=list)
    random: list[Figure] = Field(default_factory=list)
    parameters: tuple[int, int]
    seconds: dict[str, Seconds] = Field(default_factory=dict)

    def warnings(self) -> list[str]:
        """Return sentences on what does not help: worse than random, merged worse than dropped."""
        steps = {step.after: step.value for step in self.perplexity}
        dropped, median = steps.get("dropping experts"), self._median()
        found: list[str] = []
        if median is not None and (dropped is None or dropped > median):
            found.append(
                "NO BETTER THAN RANDOM EXPERTS, whose perplexity is "
                f"{median:.4g} (median of {len(self.random)} draws): choose another score, or more "
                "windows"
            )
        if "merging them" in steps and dropped is not None:
            merged = steps["merging them"]
            if merged is None or merged > dropped:
                found.append("MERGED IS WORSE THAN DROPPED: take method=drop")
        return found

    def _median(self) -> float | None:
        known = [value for value in self.random if value is not None]
        return statistics.median(known) if known and len(known) == len(self.random) else None

    def line(self) -> str:
        before, after = self.experts
        share = self.parameters[1] / self.parameters[0] - 1
        told = [
            f"{before} → {after} experts in {len(self.mixtures)} mixtures by {self.score}",
            told_in_a_line([], self.perplexity),
            *self.warnings(),
            f"parameters {share:+.1%}",
        ]
        return "; ".join(filter(None, told))

    def card(self) -> str:
        before, after = self.experts
        counts = self.parameters
        facts = [
            f"{after} of {before} experts are left in each of {len(self.mixtures)} mixtures; "
            f"the others had {1 - counts[1] / counts[0]:.1%} of the {counts[0]:,.0f} parameters.",
            *(f"{warning}." for warning in self.warnings()),
            *reconstruction_sentences(self.reconstructions),
        ]
        if self.tried:
            values = ", ".join(f"{score} {figure(value, 4)}" for score, value in self.tried.items())
            facts.append(f"Perplexity by what was scored by: {values}.")
        median = self._median()
        if median is not None:
            facts.append(f"With random experts perplexity is {median:.4g} (median).")
        lost = [
            sum(share for expert, share in enumerate(mixture.load) if expert not in mixture.kept)
            for mixture in self.mixtures
        ]
        return "".join(
            (
                halves([perplexity_rows(self.perplexity), seconds_rows(self.seconds)]),
                self._picture(lost),
                sentences(facts),
            )
        )

    def _picture(self, lost: list[float]) -> str:
        """Return the share of routed tokens whose expert is gone, block by block."""
        highest = max(lost, default=0.0)
        if len(lost) < 2 or highest <= 0:
            return ""
        line = [(number, share / highest) for number, share in enumerate(lost)]
        return (
            '<h3>What was routed to them</h3><p class="dim">Tokens that experts ran which are '
            f"gone, as a share of all that experts ran. The highest point is {highest:.1%}.</p>"
            f"{curves([('ffn', line)], len(lost) - 1, 'routed tokens lost by block')}"
            f"{axis(self.mixtures[0].where, self.mixtures[-1].where)}"
            f"{legend([('ffn', f'{sum(lost) / len(lost):.1%} on average')])}"
        )
