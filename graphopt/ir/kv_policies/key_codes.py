"""The step's own scores of all tokens, from keys in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.kv_policies.base import KVHeads, KVPolicy, State, TensorType, page_values
from graphopt.ir.kv_policies.pages import Filled, select_pages, statistics_dtype
from graphopt.ir.kv_policies.probabilities import Scoring, by_page, tail_slots

STEP_OF_BITS = {4: 0.3352, 2: 0.9957}
"""What lies between two codes, in standard deviations: of all uniform quantizers the one with the
least squared error on normal numbers (Max, Quantizing for minimum distortion, 1960, table II)."""

PRIOR_KEYS = 4
"""As many keys count as a prior of equal spread in all features, which matters to short texts."""


@dataclass(frozen=True)
class KeyCodes(KVPolicy):
    """Reads the pages of most attention, by scores of every token from keys in few bits.

    Of each key a code is kept: 4 bits of each of the features that count most in scores, a quarter
    of them; 2 bits of each of the half that counts less; and nothing of the last quarter. A feature
    counts by the mean square of the queries times the variance of the keys, which is what leaving
    it out costs in the squared error of scores. The order of features, and the centre and scale
    of each, are those of the text in front of the step. A token's probability is then the softmax
    of its estimated score, a page has the sum of its tokens' and the mean over the query heads, as
    `oracle` has of the true ones.

    The bounds of `quest` and `page-range` are loose where a page's keys differ; codes tell tokens
    of a page apart, so that pages may be small. At 16 bits a step reads an eighth of the keys'
    bytes for it, as much as the bounds of pages of 16 are.

    State: `codes` uint8 [B, G, N, page D / 4], `order` int64 [B, G, 3 D / 4], `centre` and `scale`
    [B, G, D], with D rounded up to a multiple of 8.

    Source: low-bit keys to estimate attention by are those of Lin et al., Twilight (arXiv
    2502.02770), and important features in few bits those of Yang et al., Double Sparsity (arXiv
    2408.07092). Bits by what a feature counts, with statistics of the text itself, are this
    project's own.

    Attributes:
        queries: How many at the end of a prompt say which features count.
    """

    kind: ClassVar[str] = "key-codes"
    needs_query: ClassVar[bool] = True

    queries: int = 64

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise UsageError(
                f"Features that count in the scores of {self.queries} queries.", "Give 1 or more."
            )

    @property
    def history(self) -> int:
        return self.queries

    def state_types(self, heads: KVHeads, pages: Any, batch: Any) -> dict[str, TensorType]:
        groups, width = heads.key_heads, width_of_codes(heads.k_dim)
        dtype = statistics_dtype(heads.dtype)
        return {
            "codes": ((batch, groups, pages, self.budget.page * (width // 4)), torch.uint8),
            "order": ((batch, groups, 3 * width // 4), torch.int64),
            "centre": ((batch, groups, width), dtype),
            "scale": ((batch, groups, width), dtype),
        }

    def numbers_of_page(self, heads: KVHeads) -> int:
        return self.budget.page * 3 * width_of_codes(heads.k_dim) // 4

    def init(
        self,
        q_BHRD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        mask_BT: Tensor | None,
        scoring: Scoring,
    ) -> State:
        dtype = statistics_dtype(k_BGTD.dtype)
        keys, groups = _padded(k_BGTD.to(dtype)), k_BGTD.shape[1]
        real = torch.ones_like(keys[:, :1, :, :1])
        lengths = Filled.all_of(k_BGTD)
        if mask_BT is not None:
            lengths = Filled.of_mask(mask_BT)
            real = (mask_BT != 0)[:, None, :, None].to(dtype)
        count = real.sum(2).clamp(min=1)  # [B, 1, 1]
        centre = (keys * real).sum(2) / count  # [B, G, D]
        spread = ((keys - centre[:, :, None]).square() * real).sum(2)
        size = (keys.square() * real).sum((2, 3), keepdim=True)[..., 0] / count / keys.shape[3]
        variance = (spread + PRIOR_KEYS * size) / (count + PRIOR_KEYS)
        # A query in front of a short text says nothing.
        stands = tail_slots(q_BHRD.shape[2], lengths) >= lengths.first_B[:, None]
        q = _padded(q_BHRD.to(dtype)) * stands[:, None, :, None]
        weight = q.square().unflatten(1, (groups, -1)).sum((2, 3))
        # Features that pad a head come last.
        counts = (weight * variance).nan_to_num(nan=0.0)
        counts = counts.masked_fill(
            torch.arange(keys.shape[3], device=keys.device) >= k_BGTD.shape[3], -1
        )
        order = counts.sort(dim=-1, descending=True, stable=True).indices
        order = order[..., : 3 * keys.shape[3] // 4]
        scale = variance.sqrt()
        codes = _encode(keys, order, centre, scale).masked_fill(real == 0, 0)
        pages = by_page(codes.mT, self.budget.page)  # [B, G, bytes, N, page]
        return {
            "codes": pages.permute(0, 1, 3, 4, 2).flatten(3),
            "order": order,
            "centre": centre,
            "scale": scale,
        }

    def select(
        self,
        state: State,
        q_BH1D: Tensor | None,
        k_BGTD: Tensor | None,
        lengths: Filled,
        scoring: Scoring,
    ) -> Tensor:
        assert q_BH1D is not None
        return select_pages(self.shares(state, q_BH1D, lengths, scoring), self.budget, lengths)

    def shares(self, state: State, q_BH1D: Tensor, lengths: Filled, scoring: Scoring) -> Tensor:
        """Return the share of attention that each page is estimated at, [B, G, N]."""
        page, dtype = self.budget.page, state["scale"].dtype
        order, groups = state["order"], state["order"].shape[1]
        q = _padded(q_BH1D[:, :, 0].to(dtype)).unflatten(1, (groups, -1))  # [B, G, h, D]
        kept = (q * state["scale"][:, :, None]).gather(
            3, order[:, :, None].expand(-1, -1, q.shape[2], -1)
        )
        tokens = state["codes"].unflatten(3, (page, -1)).flatten(2, 3)
        scores = kept @ _levels(tokens, dtype).mT + q @ state["centre"][..., None]
        scores = scores * scoring.scale
        if scoring.softcap is not None:
            scores = (scores / scoring.softcap).tanh() * scoring.softcap
        # Of the step's own key, which comes behind this, nothing is known: its page is read anyway.
        slot = torch.arange(scores.shape[-1], device=scores.device)
        first, last = (x[:, None, None, None] for x in (lengths.first_B, lengths.last_B))
        known = (slot >= first) & (slot < last)
        shares = scores.masked_fill(~known, torch.finfo(dtype).min).softmax(-1)
        return by_page(shares.mean(2), page).sum(-1)

    def observe(
        self,
        state: State,
        selected_BGM: Tensor,
        page_probs_BGM: Tensor | None,
        k_new_BG1D: Tensor,
        lengths: Filled,
    ) -> State:
        page = self.budget.page
        known = page_values(state, "codes", lengths.pages(page))
        order, centre, scale = state["order"], state["centre"], state["scale"]
        new = _encode(_padded(k_new_BG1D.to(scale.dtype)), order, centre, scale)
        # A row of padding alone has no key yet.
        slot = lengths.last_B.clamp(min=0)[:, None, None, None]
        place = torch.arange(known.shape[3], device=known.device) // new.shape[3]
        index = (slot // page).expand(-1, known.shape[1], -1, known.shape[3])
        old = known.gather(2, index)
        row = torch.where(place == slot % page, new.repeat(1, 1, 1, page), old)
        return {**state, "codes": known.scatter(2, index, row)}


def width_of_codes(features: int) -> int:
    """Return the size of a head, rounded up to whole bytes of codes."""
    return -(-features // 8) * 8


def _padded(x: Tensor) -> Tensor:
    """Return [..., D] with features of zeros up to `width_of_codes`."""
    return F.pad(x, (0, width_of_codes(x.shape[-1]) - x.shape[-1]))


def _encode(keys: Tensor, order: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """Return keys [B, G, T, D] in codes, uint8 [B, G, T, D / 4]."""
    index = order[:, :, None].expand(-1, -1, keys.shape[2], -1)
    least = torch.finfo(scale.dtype).tiny
    x = ((keys - centre[:, :, None]) / scale.clamp(min=least)[:, :, None]).gather(3, index)
    packed, start = [], 0
    for bits, count in parts(keys.shape[3]):
        part, start = x[..., start : start + count], start + count
        # Codes are the integers in 0..2^bits - 1, around a middle that lies between two.
        codes = (part / STEP_OF_BITS[bits] + 2 ** (bits - 1)).floor().nan_to_num(nan=0.0)
        codes = codes.clamp(0, 2**bits - 1).to(torch.uint8).unflatten(3, (8 // bits, -1))
        packed.append(sum(codes[:, :, :, n] << (bits * n) for n in range(8 // bits)))
    return torch.cat(packed, 3)


def _levels(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what codes [..., D / 4] stand for, in standard deviations: [..., 3 D / 4]."""
    levels, start, width = [], 0, codes.shape[-1] * 4
    for bits, count in parts(width):
        size = count * bits // 8
        part, start = codes[..., start : start + size], start + size
        levels += [
            (((part >> (bits * n)) & (2**bits - 1)).to(dtype) - (2**bits - 1) / 2)
            * STEP_OF_BITS[bits]
            for n in range(8 // bits)
        ]
    return torch.cat(levels, -1)


def parts(width: int) -> tuple[tuple[int, int], ...]:
    """Return the bits of a code's features, and how many features have them, in their order.

    Args:
        width: Features of a head, as `width_of_codes` rounds them.
    """
    return (4, width // 4), (2, width // 2)
