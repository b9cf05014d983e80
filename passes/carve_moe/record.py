"""What `carve-moe` tells: what became of every part, and what the carved model takes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pydantic

from graphopt.calibration.reconstruction import Reconstruction
from graphopt.report.pictures import (
    axis,
    curves,
    halves,
    legend,
    perplexity_rows,
    reconstruction_sentences,
    seconds_rows,
    sentences,
    si,
)
from graphopt.report.record import Figure, Record, Seconds, Step, told_in_a_line


@dataclass(frozen=True)
class Carved:
    """What became of one part, on held-out text.

    Attributes:
        where: The block.
        shared: Neuron groups that every token runs.
        added: Neurons of zeros that fill the groups.
        rounds: Turns of fitting.
        static, random, oracle, routed: Energy of the neurons that tokens do not run, as a share
            of all: with the best groups for every token alike, with random experts, with the
            experts of most energy, and with the router's.
        recall: Energy in the router's experts, as a share of that in the best ones.
        agreement: Share of tokens for which the router's experts are the best ones.
        load: Share of tokens that run each expert.
    """

    where: str
    shared: int
    added: int
    rounds: int
    static: float
    random: float
    oracle: float
    routed: float
    recall: float
    agreement: float
    load: list[float]


class PartSensitivity(pydantic.BaseModel):
    """What a model loses by one part: KL divergence of its next-token distributions, in nats."""

    model_config = pydantic.ConfigDict(extra="forbid")

    where: str
    kl: Figure


class Work(pydantic.BaseModel):
    """What a prompt of `tokens` tokens takes, of the given model and of the carved one.

    Attributes:
        flops: All operations.
        weight_products: Multiply-adds of products with weights alone.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    tokens: int
    flops: tuple[int, int]
    weight_products: tuple[int, int]

    def sentences(self) -> list[str]:
        """Return a sentence for each of the two, where the given model takes any."""
        return [
            f"A prompt of {self.tokens:,.0f} tokens takes {si(before)} → {si(after)} {what} "
            f"({after / before - 1:+.1%})."
            for (before, after), what in (
                (self.flops, "FLOPs in all"),
                (self.weight_products, "products with weights"),
            )
            if before and after
        ]


class CarvedParts(Record):
    """What was carved.

    Attributes:
        split: Shared, active and all neuron groups, such as `S3A3E8`.
        parts: What became of each part that was carved.
        reconstructions: What reconstruction made of their down projections.
        sensitivity: What was measured where parts have numbers of shared groups of their own.
        work: What a prompt takes before and after.
        perplexity: On held-out text, before carving and after it.
        control: The same with the same neurons for every token; None where that was not measured.
        experts_run: Experts that a token of held-out text runs, on average over parts.
        seconds: The seconds of the pass, by what they were spent on.
        batches: How many windows were taken at once, as predicted to fit the memory of a GPU; ""
            where that was not needed.
    """

    split: str
    parts: list[Carved]
    reconstructions: list[Reconstruction] = pydantic.Field(default_factory=list)
    sensitivity: list[PartSensitivity] = pydantic.Field(default_factory=list)
    work: Work
    perplexity: list[Step] = pydantic.Field(default_factory=list)
    control: Figure | None = None
    experts_run: Figure = None
    seconds: dict[str, Seconds] = pydantic.Field(default_factory=dict)
    batches: str = ""

    def line(self) -> str:
        told = [told_in_a_line([], self.perplexity), self.verdict(), self._run_on_average()]
        return "; ".join(filter(None, told))

    def _run_on_average(self) -> str:
        known = self.experts_run is not None
        return f"a token runs {self.experts_run:.2f} experts of a part on average" if known else ""

    def verdict(self) -> str:
        """Return how routing compares with the same neurons for every token; "" if not known."""
        if self.control is None or not self.perplexity:
            return ""
        carved = self.perplexity[-1].value
        static = f"{self.control:.4g} with the same neurons for every token"
        if carved is not None and carved < self.control:
            return f"perplexity {static}"
        shared, active, experts = map(int, re.findall(r"\d+", self.split))
        instead = f"shared={shared + active},active=0,experts={experts}"
        return f"ROUTING DOES NOT HELP: perplexity {static}, so take {instead}"

    def card(self) -> str:
        facts = reconstruction_sentences(self.reconstructions) + self.work.sentences()
        told = filter(None, (self.verdict(), self._run_on_average()))
        facts[:0] = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in told]
        added = sum(part.added for part in self.parts)
        if added:
            facts.append(f"{added:,.0f} neurons of zeros were added.")
        facts += [self.batches] * bool(self.batches)
        return "".join(
            (
                halves([perplexity_rows(self.perplexity), seconds_rows(self.seconds)]),
                _energy_picture(self.parts),
                sentences(facts),
            )
        )


_SHARES = {
    "random": ("norm", "random experts"),
    "static": ("head", "the same neurons for every token"),
    "routed": ("ffn", "the router's experts"),
    "oracle": ("embed", "the best experts"),
}
"""Shares of energy in what became of carved parts: style and name of their lines."""


def _energy_picture(parts: list[Carved]) -> str:
    """Return a picture of the energy in the neurons that tokens do not run, block by block."""
    found = {key: [getattr(part, key) for part in parts] for key in _SHARES}
    known = [value for values in found.values() for value in values]
    if len(parts) < 2 or not all(map(math.isfinite, known)) or max(known) <= 0:
        return ""
    highest, last = max(known), len(parts) - 1
    lines = [
        (style, [(number, value / highest) for number, value in enumerate(found[key])])
        for key, (style, _) in _SHARES.items()
    ]
    labels = [
        (style, f"{label}, {sum(found[key]) / len(parts):.1%} on average")
        for key, (style, label) in _SHARES.items()
    ]
    shared = [str(part.shared) for part in parts]
    groups = f" Shared groups of these parts: {', '.join(shared)}." if len(set(shared)) > 1 else ""
    return (
        '<h3>What tokens leave out</h3><p class="dim">Energy in the neurons that a token does not '
        f"run, as a share of all. The highest point is {highest:.1%}.{groups}</p>"
        f"{curves(lines, last, 'energy left out by block')}"
        f"{axis(parts[0].where, parts[-1].where)}{legend(labels)}"
    )
