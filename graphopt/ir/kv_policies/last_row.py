"""The pages of the highest probability when they were last read."""

from __future__ import annotations

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
)
from graphopt.ir.kv_policies.probabilities import Scoring, max_pooled

UNOBSERVED = -1.0
"""In place of a probability: the page was never read. It ranks behind every page that was."""


@dataclass(frozen=True)
class LastRow(KVPolicy):
    """Takes that attention repeats itself: a page's score is its probability when it was last read.

    State: `probability` [B, G, N], `UNOBSERVED` where a page was never read, and `steps` [B].

    Attributes:
        calibrate_every: Without a dense step now and then, a page that was not taken never is.
    """

    kind: ClassVar[str] = "last-row"
    needs_observation: ClassVar[bool] = True

    calibrate_every: int | None = None

    def __post_init__(self) -> None:
        check_calibration(self.calibrate_every)

    @property
    def history(self) -> int:
        return 1

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
        page = self.budget.page
        rows = max_pooled(q_BHRD[:, :, -1:], k_BGTD, lengths, page, scoring, mask_BT)[:, :, 0]
        present = lengths.present_BN(page)[:, None]
        return {
            "probability": rows.masked_fill(~present, UNOBSERVED),
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
        return {
            "probability": put_pages(known, selected_BGM, page_probs_BGM),
            STEPS: state[STEPS] + 1,
        }
