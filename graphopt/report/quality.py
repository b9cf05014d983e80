"""What a compile did to the quality of a model: figures, and a verdict that a person can act on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

Grade = Literal[
    "unchanged", "better", "slightly worse", "clearly worse", "destroyed", "not measured"
]

UNCHANGED = 1.01
"""Times the source's perplexity up to which a model counts as unchanged: less than four-bit
weights cost, which are taken for the model itself (1.2% for Llama 2 70B in Q4_K_M, by
llama.cpp's table)."""

SLIGHT = 1.25
"""Times the source's perplexity up to which it is slightly worse: what the next smaller model of
a family costs. The full OPT models differ by 1.17 (2.7B to 1.3B) and 1.26 (350M to 125M) on
WikiText-2 (Frantar et al., GPTQ, arXiv 2210.17323). Beyond it, a smaller model is the better
bargain."""

LOST = 0.5
"""Share of what the source knew of the text, beyond how often each token has occurred so far, from
which a model counts as destroyed."""

CERTAIN = 1.96
"""Standard errors on both sides of a mean that hold it in 95 of 100 cases."""


@dataclass(frozen=True)
class MeasuredText:
    """The text that perplexities are of; figures of unequal ones are not compared.

    Attributes:
        name: Path of the file as the user gave it, or what the built-in text is called.
        sha256: Of the text as it was tokenised, in UTF-8.
        tokens: How many tokens were run, in windows that do not overlap.
        window: Tokens of a window.
        begin: Ids that every window begins with.
        first_token: Id of the first token of the text itself.
        first_text: That token as text.
    """

    name: str
    sha256: str
    tokens: int
    window: int
    begin: list[int]
    first_token: int
    first_text: str

    def describe(self) -> str:
        """Return all of it in a line."""
        begun = f", each begun with {self.begin}" if self.begin else ""
        return (
            f"{self.name}, {self.tokens:,} tokens in windows of {self.window}{begun}; first token "
            f"{self.first_text!r} ({self.first_token}), SHA-256 {self.sha256[:12]}…"
        )

    def same_as(self, other: MeasuredText) -> bool:
        """Tell whether perplexities on both can be compared: the same tokens, in the same windows.

        Equal texts have unequal tokens under unequal tokenizers, which their number and the first
        of them show.
        """
        return dataclasses.replace(self, name=other.name) == other


@dataclass(frozen=True)
class Sample:
    """What the source and the result write behind a beginning, the likeliest token each time."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Quality:
    """Source and result on one text.

    Attributes:
        text: The text.
        perplexity_before, perplexity_after: Of the source and of the result; None where it is
            beyond any number.
        counted: Perplexity of one who knows how often each token has occurred so far, and no more.
        relative_error: Standard error of `times`, as a share of it; None where the text is too
            short to tell.
        advice: What to do where the result is worse than wanted, as clauses that passes give.
        samples: Greedy continuations.
        not_sampled: Why there are none.
        unmeasured: What the figures leave out, as sentences; "" for nothing.
        seconds: Wall time of measuring.
    """

    text: MeasuredText
    perplexity_before: float | None
    perplexity_after: float | None
    counted: float
    relative_error: float | None = None
    advice: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    not_sampled: str = ""
    unmeasured: str = ""
    seconds: float = 0.0

    @property
    def times(self) -> float | None:
        """The result's perplexity over the source's; None where one of them is no number."""
        if self.perplexity_before is None or self.perplexity_after is None:
            return None
        return self.perplexity_after / self.perplexity_before

    @property
    def source_knows(self) -> bool:
        """Whether the source predicts the text better than counts of its tokens do."""
        return self.perplexity_before is not None and self.perplexity_before < self.counted

    @property
    def grade(self) -> Grade:
        """How bad it is; "not measured" where the source itself does not know the text."""
        if self.perplexity_before is None or not self.source_knows:
            return "not measured"
        times = self.times
        if times is None:
            return "destroyed"
        if times < 1 / UNCHANGED:
            return "better"
        if times <= UNCHANGED:
            return "unchanged"
        known = math.log(self.counted / self.perplexity_before)
        if math.log(times) >= LOST * known:
            return "destroyed"
        return "slightly worse" if times <= SLIGHT else "clearly worse"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON data, with `times` and `grade`."""
        return {**dataclasses.asdict(self), "times": self.times, "grade": self.grade}


@dataclass(frozen=True)
class Verdict:
    """What became of the quality, as a grade and in a sentence or two."""

    grade: Grade
    sentence: str


def judge(quality: Quality) -> Verdict:
    """Return the verdict on measured figures."""
    grade, before, after = quality.grade, quality.perplexity_before, quality.perplexity_after
    if before is None or grade == "not measured":
        shown = "beyond any number" if before is None else f"{before:.4g}"
        return Verdict(
            grade,
            f"No verdict: the source's own perplexity on this text is {shown}, no better than "
            f"counting its tokens ({quality.counted:.4g}). Give a text in the model's language "
            "with --text FILE.",
        )
    if quality.times is None or after is None:
        said = f"perplexity went from {before:.4g} beyond any number"
    else:
        said = f"perplexity is {format_times(quality.times)} the source's"
        if quality.relative_error is not None:
            said += f" (±{CERTAIN * quality.relative_error:.0%})"
        said += f", {before:.2f} → {after:.2f}"
    of = " for prompts" if quality.unmeasured else ""
    to_do = _what_to_do(grade, quality.advice)
    more = f" {quality.unmeasured}" if quality.unmeasured else ""
    return Verdict(grade, f"{grade.capitalize()}{of}: {said}.{to_do}{more}")


def _what_to_do(grade: Grade, advice: list[str]) -> str:
    ways = ", or ".join(advice) or "give the passes milder options"
    if grade in ("unchanged", "better"):
        return ""
    if grade == "slightly worse":
        return " Try it on your own task; if it is not good enough: " + ways + "."
    if grade == "clearly worse":
        return f" {ways[:1].upper()}{ways[1:]}."
    return f" Do not use it: {ways}."


def format_times(times: float) -> str:
    """Return a ratio as `3.1 times`, with two decimals where it is small."""
    return (
        f"{times:.2f} times"
        if times < 2
        else f"{times:.1f} times"
        if times < 100
        else (f"{times:.3g} times")
    )
