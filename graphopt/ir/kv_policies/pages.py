"""Pages of a KV cache: how many a step may read, which there are, and which are taken.

Pages are those of the attention's `selected_blocks`: page n is the n-th run of `page` neighbouring
slots, counted from slot 0. Plain torch, without a number of tokens in Python, so that a step can be
recorded as a CUDA graph.

Layout letters: B batch, G key heads, H query heads, R or S queries, T slots of keys, D head size,
N pages of T slots, M pages that a step reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import UsageError


@dataclass(frozen=True)
class PageBudget:
    """How many pages a step reads at most for each KV head, sink and local included.

    Attributes:
        page: Tokens of a page.
        pages: M, all pages that a step reads.
        sink: Pages at the front of a text that are always read.
        local: The newest pages, the one being filled included, that are always read: at least 1,
            so that a token sees itself.

    Raises:
        UsageError: A number is too small, or sink and local alone exceed the budget.
    """

    page: int
    pages: int
    sink: int
    local: int

    def __post_init__(self) -> None:
        if self.page < 1:
            raise UsageError(f"A page of {self.page} tokens.", "Give 1 or more.")
        if self.sink < 0 or self.local < 1:
            raise UsageError(
                f"{self.sink} pages of sink and {self.local} of local.",
                "Give 0 or more pages of sink, and 1 or more of local: a token sees itself.",
            )
        if self.selectable < 0:
            raise UsageError(
                f"A budget of {self.tokens} tokens per KV head is below sink plus local, "
                f"{self.sink * self.page} and {self.local * self.page} tokens.",
                "Raise the budget, or lower sink or local: both count towards it.",
            )

    @classmethod
    def of(cls, page: int, budget_tokens: int, sink_tokens: int, local_tokens: int) -> PageBudget:
        """Return the budget of so many tokens per KV head, sink and local included.

        Raises:
            UsageError: A number of tokens is no multiple of the page, or the budget is below sink
                plus local.
        """
        if page < 1:
            raise UsageError(f"A page of {page} tokens.", "Give 1 or more.")
        tokens = {"budget": budget_tokens, "sink": sink_tokens, "local": local_tokens}
        for name, count in tokens.items():
            if count % page:
                below, above = count // page * page, -(-count // page) * page
                raise UsageError(
                    f"A {name} of {count} tokens is no multiple of the page of {page} tokens.",
                    f"Give {below} or {above}, or another page.",
                )
        return cls(page, budget_tokens // page, sink_tokens // page, local_tokens // page)

    @property
    def selectable(self) -> int:
        """Pages that a policy chooses: what sink and local leave of the budget."""
        return self.pages - self.sink - self.local

    @property
    def tokens(self) -> int:
        """The budget in tokens per KV head, sink and local included."""
        return self.pages * self.page


@dataclass(frozen=True)
class Filled:
    """Where the keys of each row lie among the T slots of a layer.

    Attributes:
        first_B: int64 [B], the slot of a row's first real key; padding in front moves it.
        last_B: int64 [B], the slot of its last one: in a step that of the current token.
        slots: T. That of the tokens where keys grow by copying, and the room where it is fixed.
    """

    first_B: Tensor
    last_B: Tensor
    slots: int

    @classmethod
    def all_of(cls, k_BGTD: Tensor) -> Filled:
        """Return that every slot of every row is filled."""
        batch, slots = k_BGTD.shape[0], k_BGTD.shape[2]
        first = torch.zeros(batch, dtype=torch.int64, device=k_BGTD.device)
        return cls(first, torch.full_like(first, slots - 1), slots)

    @classmethod
    def of_mask(cls, mask_BT: Tensor) -> Filled:
        """Return where a padding mask, nonzero at real tokens, begins and ends in each row."""
        real, slots = mask_BT != 0, mask_BT.shape[1]
        slot = torch.arange(slots, device=mask_BT.device)
        first = torch.where(real, slot, slots).amin(1)
        return cls(first, torch.where(real, slot, -1).amax(1), slots)

    def pages(self, page: int) -> int:
        """Return N, the number of pages that T slots have; the last may be filled in part."""
        return -(-self.slots // page)

    def present_BN(self, page: int) -> Tensor:
        """Return which pages hold a real key of a row: bool [B, N]."""
        number = torch.arange(self.pages(page), device=self.first_B.device)
        first, last = (x[:, None] // page for x in (self.first_B, self.last_B))
        return (number >= first) & (number <= last)


def all_pages(page: int, lengths: Filled) -> Tensor:
    """Return the numbers of the pages of each row in the places of all: int64 [B, 1, N], or -1."""
    number = torch.arange(lengths.pages(page), device=lengths.first_B.device)
    return torch.where(lengths.present_BN(page), number, -1)[:, None]


def always_BN(budget: PageBudget, lengths: Filled) -> Tensor:
    """Return which pages are read whatever their score, bool [B, N]: sink, local, and all that fit.

    All pages of a row are read where the budget covers them.
    """
    number = torch.arange(lengths.pages(budget.page), device=lengths.first_B.device)
    first, last = (x[:, None] // budget.page for x in (lengths.first_B, lengths.last_B))
    always = (number < first + budget.sink) | (number > last - budget.local)
    return (always | (last - first < budget.pages)) & (number >= first) & (number <= last)


def select_pages(scores_BGN: Tensor, budget: PageBudget, lengths: Filled) -> Tensor:
    """Return the pages that a step reads: sink, local, and those others of the highest scores.

    Where the budget covers all pages of a row, all are taken, whatever their scores. Of equal
    scores the page nearer to the front comes first.

    Args:
        scores_BGN: Floats [B, G, N], or 1 in place of G; fewer than N pages where newer ones have
            no score. NaN and -inf say that a page is not to be taken. What sink, local and pages
            without keys have does not count.
        budget: Whose `page` counts the N pages.

    Returns:
        int64 [B, G, M], in ascending order, each page once; -1 behind them names no page.
    """
    page, pages = budget.page, lengths.pages(budget.page)
    scores = with_pages(scores_BGN, pages, 2, float("-inf"))[..., :pages]
    present = lengths.present_BN(page)[:, None]
    always = always_BN(budget, lengths)[:, None]
    highest = torch.finfo(scores.dtype).max  # only what is always read stands above
    rank = scores.nan_to_num(nan=float("-inf"), posinf=highest, neginf=float("-inf"))
    rank = torch.where(always, float("inf"), rank).masked_fill(~present, float("-inf"))
    rank, order = rank.sort(dim=-1, descending=True, stable=True)
    taken = torch.where(rank > float("-inf"), order, pages)[..., : budget.pages]
    taken = taken.sort(dim=-1).values
    taken = taken.masked_fill(taken == pages, -1)
    return F.pad(taken, (0, budget.pages - taken.shape[-1]), value=-1)


def with_pages(x: Tensor, pages: int, axis: int, fill: float) -> Tensor:
    """Return a tensor whose axis of pages has at least so many, the new ones filled with `fill`."""
    missing = pages - x.shape[axis]
    if missing <= 0:
        return x
    shape = [*x.shape]
    shape[axis] = missing
    return torch.cat((x, x.new_full(shape, fill)), axis)


def put_pages(x_BGN: Tensor, selected_BGM: Tensor, values_BGM: Tensor) -> Tensor:
    """Return `x` with values in the pages that are selected; -1 selects none."""
    pages = x_BGN.shape[2]
    index = torch.where(selected_BGM >= 0, selected_BGM, pages)
    room = F.pad(x_BGN, (0, 1))  # one page more, for what names none
    return room.scatter(2, index, values_BGM.to(x_BGN.dtype))[..., :pages]


def take_pages(x_BGN: Tensor, selected_BGM: Tensor) -> Tensor:
    """Return what `x` has in the pages that are selected, [B, G, M]; anything where -1 is."""
    return x_BGN.gather(2, selected_BGM.clamp(min=0))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what scores and probabilities of keys of a dtype are kept in: fp32 at least."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
