"""Every page is read: what other policies are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.ir.kv_policies.base import KVPolicy, State
from graphopt.ir.kv_policies.pages import Filled
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
        present = lengths.present_BN(self.budget.page)
        number = torch.arange(present.shape[1], device=present.device)
        return torch.where(present, number, -1)[:, None]
