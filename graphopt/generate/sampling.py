"""How the next token is chosen by the logits of all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.sources.generation import GenerationSettings


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise the logits are divided by it.
        top_k: Draw from so many of the likeliest tokens; 0 for all.
        top_p: Draw from the fewest tokens whose probabilities reach this sum.
        min_p: Draw from tokens at least this share as likely as the likeliest.
        repetition_penalty: Logits of tokens that are in the text so far are divided by it where
            they are positive, and multiplied by it where they are not.
        seed: The seed of the generator that draws tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @classmethod
    def of(
        cls,
        settings: GenerationSettings,
        *,
        greedy: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
    ) -> Sampling:
        """Return what a user asks for, and where that says nothing what the model's settings do.

        Tokens are drawn where the settings say so, or where a temperature, `top_k`, `top_p` or
        `min_p` is given. What neither states has the values that transformers gives it.

        Raises:
            UsageError: `greedy` is asked for along with an option of drawing.
        """
        given = [value for value in (temperature, top_k, top_p, min_p) if value is not None]
        if greedy and any(given):
            raise UsageError(
                "Greedy decoding draws nothing, and temperature, top-k, top-p or min-p are given "
                "too.",
                "Leave out one or the other.",
            )
        penalty = settings.repetition_penalty if repetition_penalty is None else repetition_penalty
        drawn = settings.do_sample or bool(given)
        heat = settings.temperature if temperature is None else temperature
        if greedy or not drawn or heat == 0:
            return cls(repetition_penalty=penalty, seed=seed)
        return cls(
            heat,
            settings.top_k if top_k is None else top_k,
            # 0 is the likeliest token alone, which every share of it gives too.
            max(settings.top_p, 1e-9) if top_p is None else top_p,
            settings.min_p if min_p is None else min_p,
            penalty,
            seed,
        )

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            UsageError: One is out of range.
        """
        # No comparison holds of NaN.
        for name, value, fits, allowed in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "of 0 or more"),
            ("top-k", self.top_k, self.top_k >= 0, "of 0 or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min-p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition penalty", self.repetition_penalty,
             0 < self.repetition_penalty < math.inf, "above 0"),
        ):  # fmt: skip
            if not fits:
                raise UsageError(f"Generation needs a {name} {allowed}, not {value:g}.")

    def __str__(self) -> str:
        parts = []
        if self.temperature:
            parts += [f"temperature {self.temperature:g}", f"top-k {self.top_k or 'all'}"]
            parts += [f"top-p {self.top_p:g}"]
            parts += [f"min-p {self.min_p:g}"] if self.min_p else []
        if self.repetition_penalty != 1:
            parts.append(f"repetition penalty {self.repetition_penalty:g}")
        if not self.temperature:
            return f"greedy decoding{', ' * bool(parts)}{', '.join(parts)}"
        return f"sampling: {', '.join(parts)}, seed {self.seed}"


GREEDY = Sampling()
"""The likeliest token each time."""


def token_odds(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return what tokens are drawn by.

    Filters apply in transformers' order: each sees what the ones before it left.

    Args:
        logits: [vocab].
        sampling: With a temperature above 0.

    Returns:
        Probabilities [vocab] in fp64.
    """
    scores, order = (logits.double() / sampling.temperature).sort(descending=True)
    if sampling.top_k:
        scores[sampling.top_k :] = -torch.inf
    probabilities = torch.softmax(scores, -1)
    # A token belongs to the nucleus if those before it do not fill it.
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
    outside |= probabilities < sampling.min_p * probabilities[0]
    outside[0] = False
    probabilities = probabilities.masked_fill(outside, 0.0)
    return torch.zeros_like(probabilities).scatter(0, order, probabilities / probabilities.sum())


def pick_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose a token by its logits [vocab]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(token_odds(logits, sampling), 1, generator=generator))


def penalise(logits: Tensor, penalty: float, text: Tensor) -> Tensor:
    """Return logits [vocab] with those of the tokens of a text (int64 [T]) made less likely.

    Source: Keskar et al., CTRL, arXiv 1909.05858, section 4.1, as transformers has it.
    """
    own = logits[text]
    return logits.scatter(0, text, torch.where(own > 0, own / penalty, own * penalty))
