"""The first pages and the newest ones, and nothing between (StreamingLLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.ir.kv_policies.base import KVPolicy, State
from graphopt.ir.kv_policies.pages import Filled, select_pages
from graphopt.ir.kv_policies.probabilities import Scoring


@dataclass(frozen=True)
class SinkLocal(KVPolicy):
    """Reads the sink, and with all that the budget leaves the newest pages.

    It has no state, reads no key to select, and `select` gives [B, 1, M]. Positions stay those of
    the text: StreamingLLM renumbers them within its cache, which a text within the model's context
    does not need.

    Source: Xiao et al., arXiv 2309.17453.
    """

    kind: ClassVar[str] = "sink-local"

    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        number = torch.arange(lengths.pages(self.budget.page), device=lengths.first_B.device)
        newest_first = number.float().expand(len(lengths.first_B), 1, -1)
        return select_pages(newest_first, self.budget, lengths)
