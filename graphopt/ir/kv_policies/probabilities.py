"""Attention probabilities of pages, as policies learn from them and are measured by them.

Layout letters as in `graphopt.ir.kv_policies.pages`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.kv_policies.pages import Filled, statistics_dtype


@dataclass(frozen=True)
class Scoring:
    """How an attention scores keys: cap(q k^T scale), with sinks in the sum of the softmax.

    Attributes:
        scale: What products are multiplied by.
        softcap: c of c tanh(score / c); None for none.
        sinks_H: [H], scores of keys without values; None for none.
    """

    scale: float
    softcap: float | None = None
    sinks_H: Tensor | None = None


def tail_probabilities(
    q_BHRD: Tensor,
    k_BGTD: Tensor,
    lengths: Filled,
    scoring: Scoring,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Return the causal softmax of each row's last R queries over its keys: [B, G, H / G, R, T].

    Args:
        q_BHRD: Query r of a row stands at slot last - (R - 1) + r; one in front of the row's first
            key sees nothing, and its probabilities are 0.
        mask_BT: Nonzero at real tokens, where rows have gaps.

    Returns:
        In fp32 at least.
    """
    groups, rows = k_BGTD.shape[1], q_BHRD.shape[2]
    dtype = statistics_dtype(k_BGTD.dtype)
    q = q_BHRD.to(dtype).unflatten(1, (groups, -1))
    scores = torch.einsum("bghrd,bgtd->bghrt", q, k_BGTD.to(dtype)) * scoring.scale
    if scoring.softcap is not None:
        scores = (scores / scoring.softcap).tanh() * scoring.softcap
    slot = torch.arange(k_BGTD.shape[2], device=q.device)
    stands = tail_slots(rows, lengths)
    seen = (slot >= lengths.first_B[:, None, None]) & (slot <= stands[:, :, None])  # [B, R, T]
    if mask_BT is not None:
        seen = seen & (mask_BT != 0)[:, None]
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    if scoring.sinks_H is not None:
        sinks = scoring.sinks_H.to(dtype).unflatten(0, (groups, -1))
        lse = torch.logaddexp(lse, sinks[None, :, :, None, None])
    return (scores - lse).exp().nan_to_num(nan=0.0)


def tail_slots(rows: int, lengths: Filled) -> Tensor:
    """Return the slots of each row's last R queries, [B, R]; those in front of the text too."""
    behind = torch.arange(rows - 1, -1, -1, device=lengths.last_B.device)
    return lengths.last_B[:, None] - behind


def tail_pages(rows: int, lengths: Filled, page: int) -> Tensor:
    """Return which pages each row's last R queries read, all up to their own: bool [B, R, N]."""
    number = torch.arange(lengths.pages(page), device=lengths.last_B.device)
    stands = tail_slots(rows, lengths)[:, :, None]
    first = lengths.first_B[:, None, None]
    return (stands >= first) & (number >= first // page) & (number <= stands // page)


def by_page(x: Tensor, page: int) -> Tensor:
    """Return [..., T] as [..., N, page], with zeros behind the last slot."""
    return F.pad(x, (0, -x.shape[-1] % page)).unflatten(-1, (-1, page))


def max_pooled(
    q_BHRD: Tensor,
    k_BGTD: Tensor,
    lengths: Filled,
    page: int,
    scoring: Scoring,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Return the largest probability in each page, over the query heads too: [B, G, R, N]."""
    return by_page(tail_probabilities(q_BHRD, k_BGTD, lengths, scoring, mask_BT), page).amax(
        (2, -1)
    )


def page_probabilities(page_max_BHSM: Tensor, lse_BHS: Tensor, groups: int) -> Tensor:
    """Return the largest probability in each page that an attention read: [B, G, S, M].

    exp(page_max - lse) is the softmax's maximum in a page; of the query heads of a KV head the
    largest is taken.

    Args:
        page_max_BHSM, lse_BHS: The attention's results of those names.
        groups: G.
    """
    probabilities = (page_max_BHSM - lse_BHS[..., None]).exp().nan_to_num(nan=0.0)
    return probabilities.unflatten(1, (groups, -1)).amax(2)
