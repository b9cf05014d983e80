"""Keys and values in pages of a pool, as the reference of kernels that read them there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.ir.functional import append_pages, gather_pages
from graphopt.ir.kv import KVState


@dataclass(frozen=True)
class PagedKV:
    """The keys and values of a paged state; it unpacks to both in the order of their tokens.

    Attributes:
        k: [pages, G, page, D].
        v: [pages, G, page, Dv].
        table: int64 [B, N], the page of the pool that holds page n of a row.
        length: Tokens in it.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    length: int = 0

    @classmethod
    def empty(cls, state: KVState, batch: int, dtype: torch.dtype, device: torch.device) -> PagedKV:
        """Return a pool without pages."""
        page = state.layout.size
        assert page is not None
        k, v = (
            torch.zeros(0, state.heads, page, size, dtype=dtype, device=device)
            for size in (state.k_dim, state.v_dim)
        )
        return cls(k, v, torch.zeros(batch, 0, dtype=torch.long, device=device))

    def __iter__(self) -> Iterator[Tensor]:
        yield gather_pages(self.k, self.table, self.length)
        yield gather_pages(self.v, self.table, self.length)

    def extended(self, k: Tensor, v: Tensor) -> PagedKV:
        """Return a copy that holds the tokens of `k` [B, G, T, D] and `v` behind its own.

        Args:
            k, v: All tokens; those that it holds already are not written again.
        """
        added, pages = k.shape[2] - self.length, -(-k.shape[2] // self.k.shape[2])
        room = self.table.shape[0] * (pages - self.table.shape[1])
        fresh = torch.arange(len(self.k), len(self.k) + room, device=self.table.device)
        # Rows take turns, as pages do that are handed out when they are needed.
        table = torch.cat((self.table, fresh.view(-1, self.table.shape[0]).t()), 1)
        pools = [
            torch.cat((pool, pool.new_zeros(room, *pool.shape[1:]))) for pool in (self.k, self.v)
        ]
        for pool, new in zip(pools, (k, v), strict=True):
            append_pages(new[:, :, new.shape[2] - added :], pool, table, self.length)
        return replace(self, k=pools[0], v=pools[1], table=table, length=k.shape[2])
