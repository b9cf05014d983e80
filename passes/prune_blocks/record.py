"""What `prune-blocks` tells: what was removed, by which scores, and the perplexity after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import pydantic
from pydantic import Field

from graphopt.report.pictures import (
    axis,
    bar,
    figure,
    halves,
    legend,
    perplexity_rows,
    removed_in_order,
    row,
    sentences,
)
from graphopt.report.record import Figure, Record, Seconds, Step, told_in_a_line


class ScoredSet(pydantic.BaseModel):
    """A set of candidates that might be removed together.

    Attributes:
        units: The candidates.
        score: Its score on the text that all sets were scored on.
        on_more_text: Its score on other text, and more of it.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    units: list[str]
    score: Figure
    on_more_text: Figure


class PrunedBlocks(Record):
    """What was removed, and by which scores.

    Attributes:
        order: Candidates in the order of their removal.
        removed: Names of the blocks that they are, or are parts of, in that order.
        candidates: All of them.
        scores: A round each, from the candidates that were left to their scores.
        perplexity: On held-out windows, of the whole model and after each removal.
        scoring_seconds: How long scoring took.
        tokens_per_second: The speed of a forward pass, before and after.
        parameters: The number of parameters, before and after.
        nearest: The sets with the lowest scores, where they were compared on more text.
    """

    order: list[str]
    removed: list[str]
    candidates: list[str] = Field(default_factory=list)
    scores: list[dict[str, Figure]] = Field(default_factory=list)
    perplexity: list[Step] = Field(default_factory=list)
    scoring_seconds: Seconds = 0.0
    tokens_per_second: list[Figure] = Field(default_factory=list)
    parameters: list[int] = Field(default_factory=list)
    nearest: list[ScoredSet] = Field(default_factory=list)

    def line(self) -> str:
        shares = [
            f"{what} {after / before - 1:+.1%}"
            for what, (before, after) in (
                ("parameters", self._pair(self.parameters)),
                ("tokens a second", self._pair(self.tokens_per_second)),
            )
            if before and after
        ]
        return "; ".join(filter(None, [told_in_a_line(self.order, self.perplexity), *shares]))

    @staticmethod
    def _pair(values: Sequence[float | None]) -> tuple[float | None, float | None]:
        return (values[0], values[1]) if len(values) == 2 else (None, None)

    def card(self) -> str:
        facts = [f"Scoring took {self.scoring_seconds:.1f} s."]
        before, after = self._pair(self.parameters)
        if before and after:
            facts.append(
                f"{len(self.order)} of {len(self.candidates)} candidates are "
                f"gone, which had {1 - after / before:.1%} of the {before:,.0f} parameters."
            )
        before, after = self._pair(self.tokens_per_second)
        if before and after:
            facts.append(
                f"A forward pass takes in {before:,.0f} → {after:,.0f} tokens a second "
                f"({after / before - 1:+.1%})."
            )
        return "".join(
            (
                removed_in_order(self.order),
                _score_picture(self.scores, self.order),
                halves([perplexity_rows(self.perplexity), _nearest_rows(self.nearest)]),
                sentences(facts),
            )
        )


def _nearest_rows(sets: Sequence[ScoredSet]) -> str:
    """Return a bar for each of the sets that were compared on more text."""
    values = [scored.on_more_text or 0.0 for scored in sets]
    if not sets or max(values) <= 0:
        return ""
    rows = [
        row(
            ", ".join(scored.units),
            figure(scored.on_more_text, 4),
            bar([(value / max(values), "ffn")]),
        )
        for value, scored in sorted(zip(values, sets, strict=True), key=lambda pair: pair[0])
    ]
    note = "Sets with the lowest scores, scored again on more text; the lowest goes."
    return f'<h3>Nearest sets</h3><p class="dim">{note}</p>{"".join(rows)}'


_MOST_NUMBERED = 40
"""Candidates up to which numbers under their bars do not cover each other."""


def _score_picture(rounds: list[dict[str, float | None]], order: list[str]) -> str:
    """Return a bar for each candidate's score in the first round, by their decades."""
    first = rounds[0] if rounds else {}
    positive = [score for score in first.values() if score is not None and score > 0]
    if not positive:
        return ""
    lowest, highest = min(positive), max(positive)
    decades = math.log(highest / lowest) or 1.0
    bars: list[str] = []
    marks: list[str] = []
    for index, (unit, score) in enumerate(first.items()):
        # The lowest has a bar too, and so has what scores nothing.
        height = 4.0
        if score is not None and score > 0:
            height = 100 - 96 * math.log(highest / score) / decades
        style = "attention"
        title = [unit]
        for number, scored in enumerate(rounds, 1):
            if unit in scored:
                title.append(f"round {number}: {figure(scored[unit], 4)}")
        if unit in order:
            place = order.index(unit) + 1
            style = "ffn"
            title.append(f"removed as number {place}")
            middle = 100 * (index + 0.5) / len(first)
            marks.append(f'<span style="left:{middle:.2f}%">{place}</span>')
        bars.append(
            f"<g><title>{escape(chr(10).join(title))}</title>"
            f'<rect class="track" x="{index + 0.08:.2f}" width="0.84" height="100"/>'
            f'<rect class="{style}" x="{index + 0.08:.2f}" y="{100 - height:.2f}" width="0.84" '
            f'height="{height:.2f}"/></g>'
        )
    units = list(first)
    note = (
        f"Scores of the first round, from {figure(lowest)} to {figure(highest)} on a "
        "logarithmic scale."
    )
    if len(rounds) > 1:
        note += f" Point at a bar for all {len(rounds)} rounds."
    numbered = len(first) <= _MOST_NUMBERED
    removed = "removed; the number is its turn" if numbered else "removed"
    colours = legend([("attention", "kept"), ("ffn", removed)])
    return (
        f'<p class="dim">{note}</p>'
        f'<svg class="columns low" viewBox="0 0 {len(first)} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="scores by candidate">{"".join(bars)}</svg>'
        f'<div class="marks">{"".join(marks if numbered else [])}</div>'
        f"{axis(units[0], units[-1])}{colours if order else ''}"
    )
