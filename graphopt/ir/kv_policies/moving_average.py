"""What policies share whose score of a page is an average of the probabilities that were read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.ir.kv_policies.base import (
    STEPS,
    KVHeads,
    KVPolicy,
    State,
    TensorType,
    check_calibration,
    page_values,
)
from graphopt.ir.kv_policies.pages import (
    Filled,
    put_pages,
    select_pages,
    statistics_dtype,
    take_pages,
)
from graphopt.ir.kv_policies.probabilities import Scoring, max_pooled, tail_pages

UNOBSERVED = -1.0
"""In place of a probability: the page was never read. It ranks behind every page that was."""


@dataclass(frozen=True)
class MovingAverage(KVPolicy):
    """Scores a page by s p + (1 - s) of what it had, p its probability whenever it is read.

    What a step did not read keeps its score, so that not being read is no evidence of being
    unimportant. A page's first probability counts whole.

    State: `probability` [B, G, N], `UNOBSERVED` where a page was never read, and `steps` [B].

    Attributes:
        calibrate_every: Without a dense step now and then, a page that was not taken never is.
    """

    needs_observation: ClassVar[bool] = True

    calibrate_every: int | None = None

    def __post_init__(self) -> None:
        check_calibration(self.calibrate_every)

    @property
    @abstractmethod
    def newest_share(self) -> float:
        """s, above 0 and at most 1."""

    def state_types(self, heads: KVHeads, pages: Any, batch: Any) -> dict[str, TensorType]:
        shape = (batch, heads.key_heads, pages)
        return {
            "probability": (shape, statistics_dtype(heads.dtype)),
            STEPS: ((batch,), torch.int64),
        }

    def init(
        self,
        q_BHRD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        mask_BT: Tensor | None,
        scoring: Scoring,
    ) -> State:
        lengths = Filled.all_of(k_BGTD) if mask_BT is None else Filled.of_mask(mask_BT)
        page, rows = self.budget.page, q_BHRD.shape[2]
        probs = max_pooled(q_BHRD, k_BGTD, lengths, page, scoring, mask_BT)
        read = tail_pages(rows, lengths, page)
        before = torch.cat((torch.zeros_like(read[:, :1]), read[:, :-1]), 1)
        # Of the rows behind row r each leaves (1 - s) of it.
        behind = torch.arange(rows - 1, -1, -1, device=probs.device, dtype=probs.dtype)
        left = ((1 - self.newest_share) ** behind)[:, None]
        share = torch.where(before, self.newest_share * left, left) * read
        average = (probs * share[:, None]).sum(2)
        return {
            "probability": average.masked_fill(~read.any(1)[:, None], UNOBSERVED),
            STEPS: torch.zeros_like(lengths.first_B),
        }

    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        scores = page_values(state, "probability", lengths.pages(self.budget.page), UNOBSERVED)
        return select_pages(scores, self.budget, lengths)

    def observe(
        self,
        state: State,
        selected_BGM: Tensor,
        page_probs_BGM: Tensor | None,
        k_new_BG1D: Tensor,
        lengths: Filled,
    ) -> State:
        assert page_probs_BGM is not None
        pages = lengths.pages(self.budget.page)
        known = page_values(state, "probability", pages, UNOBSERVED)
        before = take_pages(known, selected_BGM)
        read = page_probs_BGM.to(known.dtype)
        average = self.newest_share * read + (1 - self.newest_share) * before
        average = torch.where(before == UNOBSERVED, read, average)
        return {
            "probability": put_pages(known, selected_BGM, average),
            STEPS: state[STEPS] + 1,
        }
