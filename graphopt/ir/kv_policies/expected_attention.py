"""Attention that queries to come will give on average, from a Gaussian of the queries so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.kv_policies.base import KVHeads, KVPolicy, State, TensorType, page_values
from graphopt.ir.kv_policies.pages import Filled, select_pages, statistics_dtype
from graphopt.ir.kv_policies.probabilities import Scoring, tail_slots


@dataclass(frozen=True)
class ExpectedAttention(KVPolicy):
    """Reads the pages of the largest attention mass that a Gaussian query is expected to give.

    For a query of mean m and covariance C the expectation of exp(scale q k) is
    exp(scale m k + scale^2 k C k / 2); a key's share of the sum of those, as a mean over the query
    heads of its KV head and summed over a page's keys, is the page's score. The paper also
    multiplies by the norm of a key's value; steps do not show values to a policy, and what is
    measured here is attention mass, so that this factor is left out.

    The paper takes mean and covariance of queries in front of the rotary embedding, and then the
    rotation that is the mean over the next `ahead` positions. Here queries come rotated, each to
    its own position. As rotations add up, the query of r positions ago, turned by r further
    positions, is what it would have been at the last position; the mean over 1..ahead of further
    turns is the paper's rotation again. Positions themselves are not needed, only `frequencies`.

    State: `mean` [B, G, H / G, D], `covariance` [B, G, H / G, D, D], both with the scale in them,
    and `log_expected` [B, G, H / G, N], the logarithm of each page's sum. A new key adds its term;
    mean and covariance stay those of the prompt.

    Source: Devoto et al., arXiv 2510.00636.

    Attributes:
        frequencies: Angles per position of the rotary embedding's pairs, R / 2 of them for the
            first R features; empty where queries are not rotated.
        interleaved: Pairs are neighbours, in place of halves of the R features.
        ahead: Over how many positions to come the rotation is averaged.
        history: The prompt's last queries that mean and covariance are of.
    """

    kind: ClassVar[str] = "expected-attention"

    frequencies: tuple[float, ...] = ()
    interleaved: bool = False
    ahead: int = 512
    history: int = 256

    def __post_init__(self) -> None:
        if self.ahead < 1 or self.history < 1:
            raise UsageError(
                f"Expected attention over {self.ahead} positions ahead, by {self.history} queries.",
                "Give 1 or more of both.",
            )

    def state_types(self, heads: KVHeads, pages: Any, batch: Any) -> dict[str, TensorType]:
        dtype = statistics_dtype(heads.dtype)
        head = (batch, heads.key_heads, heads.query_heads // heads.key_heads)
        return {
            "mean": ((*head, heads.k_dim), dtype),
            "covariance": ((*head, heads.k_dim, heads.k_dim), dtype),
            "log_expected": ((*head, pages), dtype),
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
        dtype, rows = statistics_dtype(k_BGTD.dtype), q_BHRD.shape[2]
        q = self._of_positions_ahead(q_BHRD.to(dtype) * scoring.scale)
        q = q.unflatten(1, (k_BGTD.shape[1], -1))
        real = (tail_slots(rows, lengths) >= lengths.first_B[:, None])[:, None, None, :, None].to(
            dtype
        )
        count = real.sum(3).clamp(min=1)  # a row may be padding alone
        mean = (q * real).sum(3) / count
        centred = (q - mean[:, :, :, None]) * real
        covariance = centred.mT @ centred / count[..., None]
        state = {"mean": mean, "covariance": covariance}
        slot = torch.arange(lengths.slots, device=q.device)
        seen = (slot >= lengths.first_B[:, None]) & (slot <= lengths.last_B[:, None])
        if mask_BT is not None:
            seen = seen & (mask_BT != 0)
        terms = _log_terms(state, k_BGTD).masked_fill(~seen[:, None, None], float("-inf"))
        page = self.budget.page
        terms = F.pad(terms, (0, -lengths.slots % page), value=float("-inf"))
        state["log_expected"] = terms.unflatten(-1, (-1, page)).logsumexp(-1)
        return state

    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        expected = state["log_expected"].softmax(-1).mean(2)
        return select_pages(expected, self.budget, lengths)

    def observe(
        self,
        state: State,
        selected_BGM: Tensor,
        page_probs_BGM: Tensor | None,
        k_new_BG1D: Tensor,
        lengths: Filled,
    ) -> State:
        page = self.budget.page
        known = page_values(state, "log_expected", lengths.pages(page), float("-inf"), axis=3)
        empty = (lengths.last_B < 0)[:, None, None, None]  # a row of padding alone
        term = _log_terms(state, k_new_BG1D).masked_fill(empty, float("-inf"))
        index = (lengths.last_B.clamp(min=0) // page)[:, None, None, None].expand_as(term)
        total = torch.logaddexp(known.gather(3, index), term)
        return {**state, "log_expected": known.scatter(3, index, total)}

    def _of_positions_ahead(self, q_BHRD: Tensor) -> Tensor:
        """Return queries turned to the last position, and by the mean turn of those to come."""
        pairs = len(self.frequencies)
        if not pairs:
            return q_BHRD
        frequency = q_BHRD.new_tensor(self.frequencies)
        rows = q_BHRD.shape[2]
        since = torch.arange(rows - 1, -1, -1, device=q_BHRD.device, dtype=q_BHRD.dtype)
        ahead = torch.arange(1, self.ahead + 1, device=q_BHRD.device, dtype=q_BHRD.dtype)
        angles = (since[:, None, None] + ahead[:, None]) * frequency  # [R, ahead, pairs]
        cos, sin = angles.cos().mean(1), angles.sin().mean(1)
        rotated, rest = q_BHRD[..., : 2 * pairs], q_BHRD[..., 2 * pairs :]
        layout = (-1, 2) if self.interleaved else (2, -1)
        first, second = rotated.unflatten(-1, layout).unbind(-1 if self.interleaved else -2)
        turned = (first * cos - second * sin, second * cos + first * sin)
        both = torch.stack(turned, -1 if self.interleaved else -2).flatten(-2)
        return torch.cat((both, rest), -1)


def _log_terms(state: State, k_BGTD: Tensor) -> Tensor:
    """Return the logarithm of the expectation of exp(q k) of each key: [B, G, H / G, T]."""
    k = k_BGTD.to(state["mean"].dtype)
    linear = torch.einsum("bghd,bgtd->bght", state["mean"], k)
    square = torch.einsum("bgtd,bghde,bgte->bght", k, state["covariance"], k)
    return linear + square / 2
