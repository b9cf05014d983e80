"""The pages that hold most of a step's attention, found by computing all of it: for measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphopt.ir.kv_policies.base import KVPolicy, State
from graphopt.ir.kv_policies.pages import Filled, select_pages
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
