"""Slots of a device for pages that lie in host memory: which page gets which, and what is copied.

In torch, and by kernels for a device, which do the same and read and write pinned memory by its
address.

Layout letters: R rows (one for each key head of each text), N pages of a row, M pages that a step
reads, S slots of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Places:
    """Which pages of a layer lie in which slots of its pool, S = 2 M of them a row.

    Attributes:
        selected: int64 [R, M], the pages that the next step reads, -1 for none.
        slot_pages: int64 [R, S], the page in each slot, or -1.
        table: int32 [R, N], the slot that each page was brought to last, counted over all rows, or
            -1; what stands there of pages that are not selected is not true any more.
        marks: int8 [R, N], zeros between one use and the next.
    """

    selected: Tensor
    slot_pages: Tensor
    table: Tensor
    marks: Tensor

    @classmethod
    def nowhere(cls, rows: int, pages: int, read: int, device: torch.device) -> Places:
        """Return that no slot has a page."""
        return cls(
            torch.full((rows, read), -1, device=device),
            torch.full((rows, 2 * read), -1, device=device),
            torch.full((rows, pages), -1, dtype=torch.int32, device=device),
            torch.zeros(rows, pages, dtype=torch.int8, device=device),
        )

    def moved(self) -> list[Tensor]:
        """Return what `find_slots` changes."""
        return [self.selected, self.slot_pages, self.table]

    def forget(self) -> None:
        """Say that no slot has a page, in the same memory."""
        for x in self.moved():
            x.fill_(-1)


def fetch_plan(
    wanted_RM: Tensor, current_RM: Tensor, slot_pages_RS: Tensor, pages: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find slots for the pages that are wanted and not current: slots that hold no current page.

    Args:
        wanted_RM, current_RM: Pages of the next step and of the present one, -1 for none.
        slot_pages_RS: The page in each slot, or -1; S is at least twice M.

    Returns:
        For each wanted page its number where it is fetched, or -1; the slot, where it is; and the
        page in each slot afterwards.
    """
    here = torch.zeros(len(wanted_RM), pages, dtype=torch.bool, device=wanted_RM.device)
    here = _put(here, current_RM, torch.ones_like(current_RM, dtype=torch.bool))
    kept = (slot_pages_RS >= 0) & here.gather(1, slot_pages_RS.clamp(min=0))
    new = (wanted_RM >= 0) & ~here.gather(1, wanted_RM.clamp(min=0))
    free_first = kept.to(torch.uint8).argsort(dim=1, stable=True)
    slot = free_first.gather(1, (new.cumsum(1) - 1).clamp(min=0))
    source = torch.where(new, wanted_RM, -1)
    after = torch.where(kept, slot_pages_RS, -1)
    return source, slot, _put(after, torch.where(new, slot, -1), wanted_RM)


def find_slots(places: Places, wanted_BGM: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Give slots to the pages of the next step, in place; return what is fetched and where to.

    Args:
        wanted_BGM: int64, -1 for none.
        moved: int64, to which the number of pages that are fetched is added.

    Returns:
        The pages, int64 [R, M], -1 for those that are there; and their slots.
    """
    rows, pages = places.table.shape
    wanted = wanted_BGM.reshape(rows, -1)
    source, slot, places.slot_pages = fetch_plan(wanted, places.selected, places.slot_pages, pages)
    row = torch.arange(rows, device=wanted.device)[:, None]
    here = row * places.slot_pages.shape[1] + slot
    places.table = _put(places.table, source, here)
    places.selected = wanted.clone()
    moved += (source >= 0).sum()
    return source, slot


def find_slots_by_kernel(
    places: Places, wanted_BGM: Tensor, moved: Tensor
) -> tuple[Tensor, Tensor]:
    """As `find_slots`, by one kernel."""
    from graphopt.runtime.kernels.kv_fetch import plan_fetch

    (rows, pages), read = places.table.shape, places.selected.shape[1]
    wanted = wanted_BGM if wanted_BGM.stride(-1) == 1 else wanted_BGM.contiguous()
    source, slot = torch.empty_like(places.selected), torch.empty_like(places.selected)
    free = torch.empty_like(places.slot_pages, dtype=torch.int32)
    listed = 1 << (read - 1).bit_length()
    plan_fetch[(rows,)](
        wanted, places.selected, places.slot_pages, places.table, places.marks, free,
        source, slot, moved, *wanted.stride()[:2], wanted.shape[1], pages,
        READ=read, LISTED=listed, num_warps=min(16, max(1, listed // 64)),
    )  # fmt: skip
    return source, slot


def _put(x_RN: Tensor, index_RM: Tensor, values_RM: Tensor) -> Tensor:
    """Return `x` with values at indices; -1 is none."""
    count = x_RN.shape[1]
    room = torch.cat((x_RN, x_RN[:, :1]), 1)
    index = torch.where(index_RM >= 0, index_RM, count)
    return room.scatter(1, index, values_RM.to(x_RN.dtype))[:, :count].contiguous()


def fetch(host: Tensor, pool: Tensor, source: Tensor, slot: Tensor) -> None:
    """Copy pages [R, N, page, D] of the host into slots [R, S, page, D].

    Args:
        source: int64 [R, M], pages, -1 for none.
        slot: int64 [R, M], where they go.
    """
    if not pool.is_cuda:
        row, item = (source >= 0).nonzero(as_tuple=True)
        pool[row, slot[row, item]] = host[row, source[row, item]]
        return
    fetch_by_kernel(host, pool, source, slot)


def fetch_by_kernel(host: Tensor, pool: Tensor, source: Tensor, slot: Tensor) -> None:
    """As `fetch`, by a kernel that reads pinned memory."""
    from graphopt.runtime.kernels.kv_fetch import fetch_pages

    rows, pages = host.shape[:2]
    from_words, to_words = (x.view(torch.int32) for x in (host, pool))
    words = from_words[0, 0].numel()
    fetch_pages[(rows, source.shape[1])](
        from_words, to_words, source.contiguous(), slot.contiguous(),
        pages, pool.shape[1], source.shape[1],
        WORDS=words, BLOCK=min(1024, 1 << (words - 1).bit_length()), num_warps=4,
    )  # fmt: skip


def write_token(
    new: Tensor,
    host: Tensor,
    pool: Tensor,
    staged: Tensor | None,
    table: Tensor,
    last_B: Tensor,
) -> None:
    """Write the new token of each row to the host, to the slot of its page, and to what is staged.

    Args:
        new: [R, D].
        host: [R, N, page, D].
        pool: [R S, 1, page, D].
        staged: [R N, 1, page, D].
        table: int32 [R, N].
        last_B: int64 [B].
    """
    if pool.is_cuda:
        write_token_by_kernel(new, host, pool, staged, table, last_B)
        return
    rows, pages, page, _ = host.shape
    row = torch.arange(rows, device=table.device)
    last = last_B.repeat_interleave(rows // len(last_B))
    number, place = last // page, last % page
    host[row, number, place] = new
    slot = table[row, number].long()
    pool[slot[slot >= 0], 0, place[slot >= 0]] = new[slot >= 0]
    if staged is not None:
        staged[row * pages + number, 0, place] = new


def write_token_by_kernel(
    new: Tensor,
    host: Tensor,
    pool: Tensor,
    staged: Tensor | None,
    table: Tensor,
    last_B: Tensor,
) -> None:
    """As `write_token`, by a kernel that writes pinned memory."""
    from graphopt.runtime.kernels.kv_fetch import append_token

    rows, pages, page, _ = host.shape
    words = [x.contiguous().view(torch.int32) for x in (new, host, pool)]
    width = words[0].shape[1]
    append_token[(rows,)](
        *words, None if staged is None else staged.view(torch.int32), table, last_B,
        rows // len(last_B), pages,
        PAGE=page, WORDS=width, BLOCK=1 << (width - 1).bit_length(), STAGED=staged is not None,
        num_warps=1,
    )  # fmt: skip
