"""Bounds on the scores of a page's keys, from the least and the largest of their features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.kv_policies.base import KVHeads, KVPolicy, State, TensorType, page_values
from graphopt.ir.kv_policies.pages import Filled, select_pages, statistics_dtype
from graphopt.ir.kv_policies.probabilities import Scoring


@dataclass(frozen=True)
class Quest(KVPolicy):
    """Reads the pages whose keys could have the highest scores for the step's own query.

    No key of a page scores above sum over d of max(q_d min_d, q_d max_d), with the least and the
    largest of each feature of its keys, as they are kept: behind the rotary embedding. Of the
    query heads of a KV head the largest bound counts.

    State: `least` and `largest` [B, G, N, D] in the keys' dtype. A step reads all of it, as much as
    one key and one value of each page; a new key changes its page's row.

    Source: Tang et al., arXiv 2406.10774.
    """

    kind: ClassVar[str] = "quest"
    needs_query: ClassVar[bool] = True

    def state_types(self, heads: KVHeads, pages: Any, batch: Any) -> dict[str, TensorType]:
        shape = (batch, heads.key_heads, pages, heads.k_dim)
        return {"least": (shape, heads.dtype), "largest": (shape, heads.dtype)}

    def init(
        self,
        q_BHRD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        mask_BT: Tensor | None,
        scoring: Scoring,
    ) -> State:
        page, slots = self.budget.page, k_BGTD.shape[2]
        real = torch.ones_like(k_BGTD[:, :1, :, :1], dtype=torch.bool)
        if mask_BT is not None:
            real = (mask_BT != 0)[:, None, :, None]
        behind = (0, 0, 0, -slots % page)
        real = F.pad(real, behind).unflatten(2, (-1, page))
        keys = F.pad(k_BGTD, behind).unflatten(2, (-1, page))
        empty = ~real.any(3)  # bounds of a page without keys are 0
        least = keys.masked_fill(~real, float("inf")).amin(3).masked_fill(empty, 0)
        largest = keys.masked_fill(~real, float("-inf")).amax(3).masked_fill(empty, 0)
        return {"least": least, "largest": largest}

    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        assert q_BH1D is not None
        least, largest = state["least"], state["largest"]
        dtype = statistics_dtype(least.dtype)
        q = q_BH1D[:, :, 0].to(dtype).unflatten(1, (least.shape[1], -1))
        # Which product is larger is by the sign of q: two matrix products in place of maxima.
        bound = q.clamp(min=0) @ largest.to(dtype).mT + q.clamp(max=0) @ least.to(dtype).mT
        return select_pages(bound.amax(2), self.budget, lengths)

    def observe(
        self,
        state: State,
        selected_BGM: Tensor,
        page_probs_BGM: Tensor | None,
        k_new_BG1D: Tensor,
        lengths: Filled,
    ) -> State:
        page, pages = self.budget.page, lengths.pages(self.budget.page)
        last = lengths.last_B
        opens = ((last % page == 0) | (last == lengths.first_B))[:, None, None, None]
        after = {}
        for name, bound in (("least", torch.minimum), ("largest", torch.maximum)):
            known = page_values(state, name, pages)
            new = k_new_BG1D.to(known.dtype)
            # A row of padding alone has no page yet; the one its first key comes into begins anew.
            index = (last.clamp(min=0) // page)[:, None, None, None].expand_as(new)
            both = torch.where(opens, new, bound(known.gather(2, index), new))
            after[name] = known.scatter(2, index, both)
        return after
