"""What the KV policy `predictor` is trained on: histories as decoding leaves them, and its losses.

Layout letters as in `graphopt.training.kv_traces`; n samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.kv_policies import (
    Ema,
    Filled,
    PageBudget,
    Predictor,
    Scoring,
    State,
    select_pages,
)
from graphopt.ir.kv_policies.attention_cnn import predict
from graphopt.ir.kv_policies.pages import always_BN
from graphopt.ir.kv_policies.predictor import next_averages
from graphopt.support.progress import Progress
from graphopt.training.kv_replay import pages_read
from graphopt.training.kv_traces import PageTraces

SOFTNESS = 0.1
"""Over how much of the scores' standard deviation the choice of pages is softened."""

EDGE, BISECTIONS = 20.0, 40
"""How far from all scores the number t is looked for, and in how many halvings."""


@dataclass(frozen=True)
class Exploring(Ema):
    """The moving average with noise: what it reads says less about what it leaves out.

    From histories of the moving average itself a network learns that what was not read is
    unimportant, as that one has found. Following its own predictions, it would never look again.

    Attributes:
        noise: The standard deviation of the logarithm of what scores are multiplied by.
        generator: Draws it.
    """

    noise: float = 1.0
    generator: torch.Generator | None = field(default=None, compare=False)

    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        scores = state["probability"]
        drawn = torch.randn(scores.shape, generator=self.generator, device=scores.device)
        return select_pages(scores * (drawn * self.noise).exp(), self.budget, lengths)


class Samples:
    """Histories as decoding leaves them, and the rows that come behind.

    Each text has one of the budgets, in turns.

    Attributes:
        device: Where they lie.
        rows: L * B * G, all sequences of rows.
        steps: S.
    """

    def __init__(
        self,
        traces: PageTraces,
        policy: Predictor,
        several: list[PageBudget],
        seed: int,
        progress: Progress,
    ) -> None:
        device = traces.probs_LBGSN.device
        generator = torch.Generator(device).manual_seed(seed)
        layers, texts, groups, self.steps, _ = traces.probs_LBGSN.shape
        self._traces, self._history = traces, policy.history
        self.device, self._several = device, several
        which = [text % len(several) for text in range(texts)]
        read = torch.cat(
            [
                pages_read(
                    Exploring(several[one], policy.calibrate_every, generator=generator),
                    traces.texts([text]), policy.history,
                    progress=progress, what="preparing histories",
                )
                for text, one in enumerate(which)
            ],
            1,
        )  # fmt: skip
        self.rows = layers * texts * groups
        budgets = torch.tensor(which, device=device)[None, :, None]
        self._budget = budgets.expand(layers, -1, groups).flatten()
        self._read = read.flatten(0, 2)
        self._probs = traces.probs_LBGSN.flatten(0, 2)
        self._mass = traces.mass_LBGSN.flatten(0, 2)
        self._held = torch.empty_like(self._probs)
        row = torch.zeros_like(self._probs[:, 0], dtype=torch.float32)
        for step in range(self.steps):
            after = next_averages(row, self._probs[:, step].float())
            row = torch.where(self._read[:, step], after, row)
            self._held[:, step] = row

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Return so many histories, drawn at random with what comes behind them."""
        row = torch.randint(self.rows, (count,), generator=generator)
        step = torch.randint(self._history, self.steps, (count,), generator=generator)
        row, step = (x.to(self._read.device) for x in (row, step))
        past = step[:, None] - torch.arange(self._history, 0, -1, device=step.device)
        held, read = (x[row[:, None], past].float() for x in (self._held, self._read))
        last, slots = self._traces.first + step, self._traces.probs_LBGSN.shape[4]
        lengths = Filled(torch.zeros_like(last), last, slots * self._traces.page)
        present = lengths.present_BN(self._traces.page)
        # Sink and local are read anyway, and outside for the network.
        of_all = torch.stack([present & ~always_BN(budget, lengths) for budget in self._several])
        selectable = torch.tensor([budget.selectable for budget in self._several])
        one = self._budget[row]
        return Batch(
            torch.stack((held, read), 1),
            of_all[one, torch.arange(count, device=one.device)],
            self._probs[row, step].float().sqrt().sqrt(),
            self._mass[row, step].float(),
            selectable.to(one.device)[one],
        )


@dataclass(frozen=True)
class Batch:
    """Histories [n, 2, R, N], the pages [n, N] that may be chosen, and the row behind each.

    Attributes:
        target, mass: Fourth roots of probabilities, and attention mass: [n, N].
        selectable: [n], how many pages are chosen.
    """

    x: Tensor
    inside: Tensor
    target: Tensor
    mass: Tensor
    selectable: Tensor

    def losses(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean squared error, and what is missing to the best choice's recall."""
        scores = predict(self.x, self.inside, weights)
        error = F.mse_loss(scores[self.inside], self.target[self.inside])
        width = self._spread(scores.detach()) * SOFTNESS
        chosen = softly_chosen(scores / width, self.inside, self.selectable[:, None])
        return error, 1 - self._share(chosen).mean()

    def _threshold(self, scores: Tensor) -> Tensor:
        """Return the last score that is taken, [n, 1]."""
        last = (self.selectable.clamp(max=scores.shape[1]) - 1)[:, None]
        return scores.sort(-1, descending=True).values.gather(1, last)

    def _share(self, chosen: Tensor) -> Tensor:
        """Return the chosen pages' mass, as a share of the mass of the best ones: [n]."""
        mass = self.mass * self.inside
        best = mass >= self._threshold(mass)
        return (mass * chosen).sum(-1) / (mass * best).sum(-1).clamp(min=1e-6)

    def _spread(self, scores: Tensor) -> Tensor:
        """Return the standard deviation of the scores inside, [n, 1]."""
        count = self.inside.sum(-1, keepdim=True).clamp(min=1)
        mean = (scores * self.inside).sum(-1, keepdim=True) / count
        spread = ((scores - mean).square() * self.inside).sum(-1, keepdim=True) / count
        return spread.sqrt().clamp(min=1e-4)


def softly_chosen(scores: Tensor, inside: Tensor, count: Tensor) -> Tensor:
    """Return how far each page is taken, 0 to 1: `count` pages in all, by sigmoid(score - t).

    The gradient knows that t moves with the scores: what one page gains the others lose, those near
    t the most.
    """
    masked = scores.detach().masked_fill(~inside, float("-inf"))
    low = masked.masked_fill(~inside, float("inf")).amin(-1, keepdim=True) - EDGE
    high = masked.amax(-1, keepdim=True) + EDGE
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        many = (masked - middle).sigmoid().sum(-1, keepdim=True) > count
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    share = (masked - low).sigmoid()
    slope = share * (1 - share)
    slope = slope / slope.sum(-1, keepdim=True).clamp(min=1e-12)
    moved = ((scores - scores.detach()) * slope).sum(-1, keepdim=True)  # 0, with a gradient
    return (scores - low - moved).sigmoid() * inside
