"""Votes of a prompt's last queries, counted once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.kv_policies.base import KVHeads, KVPolicy, State, TensorType, page_values
from graphopt.ir.kv_policies.pages import Filled, select_pages, statistics_dtype
from graphopt.ir.kv_policies.probabilities import Scoring, by_page, tail_probabilities


@dataclass(frozen=True)
class SnapKV(KVPolicy):
    """Reads the pages that the last queries of the prompt attended to, and whatever came later.

    A key's votes are the mean of its probability over the window's queries and the query heads of
    its KV head, and of that a mean with its neighbours; a page has the sum. That is done once, at
    the prompt's end. The window itself and the tokens that are generated are kept, as in the
    paper, which lets a cache grow by them; here the budget is fixed, so that they displace pages
    of the prompt one after another, and at last each other, the newest staying.

    State: `votes` [B, G, N], and `kept_from` [B], the slot of the first token that is kept without
    votes. `observe` changes nothing.

    Source: Li et al., arXiv 2404.14469.

    Attributes:
        window: Queries that vote.
        kernel: Neighbouring keys that share their votes; odd.
    """

    kind: ClassVar[str] = "snapkv"

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(
                f"Votes of {self.window} queries over {self.kernel} neighbouring keys.",
                "Give 1 or more queries, and an odd number of keys.",
            )

    @property
    def history(self) -> int:
        return self.window

    def state_types(self, heads: KVHeads, pages: Any, batch: Any) -> dict[str, TensorType]:
        shape = (batch, heads.key_heads, pages)
        return {
            "votes": (shape, statistics_dtype(heads.dtype)),
            "kept_from": ((batch,), torch.int64),
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
        probabilities = tail_probabilities(q_BHRD, k_BGTD, lengths, scoring, mask_BT)
        # A query in front of a short text has no vote.
        window = (lengths.last_B - lengths.first_B + 1).clamp(max=q_BHRD.shape[2])
        votes = probabilities.mean(2).sum(2) / window.clamp(min=1)[:, None, None]
        votes = F.avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        return {
            "votes": by_page(votes, self.budget.page).sum(-1),
            "kept_from": lengths.last_B - window + 1,
        }

    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        pages = lengths.pages(self.budget.page)
        votes = page_values(state, "votes", pages)[..., :pages]
        number = torch.arange(pages, device=votes.device)
        kept = (number >= (state["kept_from"] // self.budget.page)[:, None])[:, None]
        # All votes of a head sum up to 1 at most: what is kept stands above.
        scores = torch.where(kept, number.to(votes.dtype) + 2, votes)
        return select_pages(scores, self.budget, lengths)
