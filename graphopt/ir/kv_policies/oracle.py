"""The pages that hold most of a step's attention, found by computing all of it: for measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.kv_policies.base import KVPolicy, State
from graphopt.ir.kv_policies.pages import Filled, always_BN, select_pages
from graphopt.ir.kv_policies.probabilities import Scoring, by_page, tail_probabilities


@dataclass(frozen=True)
class OracleTopK(KVPolicy):
    """Reads the pages of the largest attention mass, summed over the query heads of a KV head.

    So no choice of as many pages per KV head, sink and local included, has a higher recall. It has
    no state.
    """

    kind: ClassVar[str] = "oracle"
    needs_query: ClassVar[bool] = True
    measuring_only: ClassVar[bool] = True

    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        mass = page_mass(q_BH1D, k_BGTD, lengths, self.budget.page, scoring)
        return select_pages(mass, self.budget, lengths)


@dataclass(frozen=True)
class OracleTopP(KVPolicy):
    """Reads as few pages as hold a share of the attention mass, and never more than the budget.

    Mass is that of `OracleTopK`, sink and local counted first since they are read anyway; where
    the budget covers all pages, all are read. How many pages it names says how many a step needs.
    It has no state.

    Attributes:
        share: Of the attention mass, above 0 and at most 1.
    """

    kind: ClassVar[str] = "oracle-top-p"
    needs_query: ClassVar[bool] = True
    measuring_only: ClassVar[bool] = True

    share: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(
                f"The pages of {self.share} of the attention mass.",
                "Give a number above 0, and at most 1.",
            )

    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        mass = page_mass(q_BH1D, k_BGTD, lengths, self.budget.page, scoring)
        always = always_BN(self.budget, lengths)[:, None]
        largest, order = mass.masked_fill(always, -1).sort(dim=-1, descending=True, stable=True)
        read_before = largest.clamp(min=0).cumsum(-1) - largest.clamp(min=0)
        read_before = read_before + (mass * always).sum(-1, keepdim=True)
        enough = read_before >= self.share * mass.sum(-1, keepdim=True)
        enough = torch.zeros_like(enough).scatter(2, order, enough)
        return select_pages(mass.masked_fill(enough, float("-inf")), self.budget, lengths)


def page_mass(
    q_BH1D: Tensor | None,
    k_BGTD: Tensor | None,
    lengths: Filled,
    page: int,
    scoring: Scoring,
) -> Tensor:
    """Return the attention mass of each page, a mean over the query heads: [B, G, N]."""
    assert q_BH1D is not None and k_BGTD is not None
    probabilities = tail_probabilities(q_BH1D, k_BGTD, lengths, scoring)
    return by_page(probabilities[:, :, :, 0], page).sum(-1).mean(2)
