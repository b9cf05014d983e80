"""Every page is read: what other policies are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphopt.ir.kv_policies.base import KVPolicy, State
from graphopt.ir.kv_policies.pages import Filled, all_pages
from graphopt.ir.kv_policies.probabilities import Scoring


@dataclass(frozen=True)
class Dense(KVPolicy):
    """Reads all pages, whatever the budget: of that only the size of a page counts.

    It has no state, and `select` gives [B, 1, N].
    """

    kind: ClassVar[str] = "dense"

    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        return all_pages(self.budget.page, lengths)
