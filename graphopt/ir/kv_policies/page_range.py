"""Estimates of the mass of pages for the step's own query, from the range of their keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.kv_policies.base import State
from graphopt.ir.kv_policies.pages import Filled, select_pages, statistics_dtype
from graphopt.ir.kv_policies.probabilities import Scoring
from graphopt.ir.kv_policies.quest import Quest


@dataclass(frozen=True)
class PageRange(Quest):
    """Reads the pages that by the range of their keys have the largest share of attention.

    Of a page the least and the largest of each feature are kept, as by `quest`. A query's scores
    in the page lie between the bounds that both give. `quest` goes by the upper one, which few
    keys come near, and by the largest over the query heads, though a head whose scores are all
    high attends to no page more for that. Here a page's score is estimated in between, and each
    query head's softmax over all pages of these estimates counts as much as any other's:

        estimate = middle of both bounds + reach * half of what lies between them

    State: that of `quest`, and a step reads as much.

    Source: the middle of a page's cuboid is among the estimates of Chen et al., ArkVale
    (NeurIPS 2024); `reach` and shares in place of scores are this project's own.

    Attributes:
        reach: 1 for the upper bound, 0 for the middle.
    """

    kind: ClassVar[str] = "page-range"

    reach: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.reach <= 1:
            raise UsageError(
                f"An estimate that goes {self.reach} of the way from the middle to the bound.",
                "Give 0 to 1.",
            )

    @property
    def lower(self) -> float:
        """What the lower bound counts in an estimate; the upper one counts the rest."""
        return (1 - self.reach) / 2

    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        assert q_BH1D is not None
        return select_pages(self.shares(state, q_BH1D, lengths, scoring), self.budget, lengths)

    def shares(self, state: State, q_BH1D: Tensor, lengths: Filled, scoring: Scoring) -> Tensor:
        """Return the share of attention that each page is estimated at, [B, G, N]."""
        dtype = statistics_dtype(state["least"].dtype)
        least, largest = (state[name].to(dtype) for name in ("least", "largest"))
        q = q_BH1D[:, :, 0].to(dtype).unflatten(1, (least.shape[1], -1)) * scoring.scale
        positive, negative = q.clamp(min=0), q.clamp(max=0)
        # By the largest features where q is positive, and the least elsewhere, for the upper bound.
        estimate = positive.lerp(negative, self.lower) @ largest.mT
        estimate = estimate + negative.lerp(positive, self.lower) @ least.mT
        if scoring.softcap is not None:
            estimate = (estimate / scoring.softcap).tanh() * scoring.softcap
        # Of the step's own key, which comes behind this, nothing is known.
        before = dataclasses.replace(lengths, last_B=lengths.last_B - 1)
        known = before.present_BN(self.budget.page)[:, None, None, : estimate.shape[-1]]
        estimate = estimate[..., : known.shape[-1]]
        shares = estimate.masked_fill(~known, torch.finfo(dtype).min).softmax(-1)
        return shares.mean(2)
