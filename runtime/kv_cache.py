"""KV caches of fixed room, written in place: contiguous, as a ring, and in pages of a pool.

How many tokens a cache holds is a tensor, so that a step is the same kernels each time. Whoever
runs a model moves it on.

Layout letters: B batch, S new tokens, T room, G key heads, D head size, N pages of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from graphopt.ir.kv_memory import PagedKV, PolicyKV, from_pages, from_ring, row_bytes, unpack_rows
from graphopt.runtime.attention import Keys

Layout: TypeAlias = tuple[str, int | None]
"""`contiguous`, `ring` or `paged`, and the slots of the ring or the tokens of a page."""

AppendKV: TypeAlias = Callable[..., Tensor]
"""Writes new keys and values; `graphopt.ir.kv_memory.append_kv`, or a kernel that does the same."""


@dataclass(frozen=True)
class FixedKVCache(ABC):
    """Keys and values of one layer in memory of fixed size.

    Attributes:
        k, v: The memory.
        seq_lens: int32 [B], or [1] for all rows: tokens in it before a step.
        bits: 4 or 8 where the memory holds rows of codes (`kv_memory.pack_rows`), else 16.
    """

    k: Tensor
    v: Tensor
    seq_lens: Tensor
    bits: int = field(default=16, kw_only=True)

    @property
    def rows(self) -> int:
        """B."""
        return int(self.k.shape[0])

    @property
    def room(self) -> int | None:
        """Tokens that a row may come to have; None for any number."""
        return int(self.k.shape[2])

    def check(self, k: Tensor) -> None:
        """Refuse new keys that have no room.

        Raises:
            ValueError: There are other rows than the cache has, or too many tokens.
        """
        if k.shape[0] != self.rows or (self.room is not None and k.shape[2] > self.room):
            room = "any number of" if self.room is None else self.room
            raise ValueError(
                f"keys of {k.shape[2]} tokens in {k.shape[0]} rows do not fit a cache for "
                f"{room} tokens in {self.rows} rows: make one that is large enough"
            )

    def _keys(self, new_v: Tensor, k: Tensor, v: Tensor, **where: Tensor) -> Keys:
        """Return what an attention reads, of memory as this cache has it."""
        return Keys(k, v, bits=self.bits, value_dim=new_v.shape[3], **where)

    @abstractmethod
    def append(self, k: Tensor, v: Tensor, append: AppendKV, window: int | None) -> Keys:
        """Write the keys and values of new tokens; return what their attention reads.

        Args:
            k, v: [B, G, S, D] and [B, G, S, Dv].
            window: Keys that a query sees, its own included; None for all.
        """


@dataclass(frozen=True)
class StaticKVCache(FixedKVCache):
    """All tokens, one behind the other: `k` [B, G, T, D], `v` [B, G, T, Dv]."""

    def append(self, k: Tensor, v: Tensor, append: AppendKV, window: int | None) -> Keys:
        kv_lens = append(k, v, self.k, self.v, self.seq_lens, bits=self.bits)
        return self._keys(v, self.k, self.v, kv_lens=kv_lens)

    def narrowed(self, room: int) -> StaticKVCache:
        """Return the cache's first `room` tokens, in the same memory."""
        return replace(self, k=self.k[:, :, :room], v=self.v[:, :, :room])


@dataclass(frozen=True)
class RingKVCache(FixedKVCache):
    """The last T tokens, number t in slot t mod T: `k` [B, G, T, D], `v` [B, G, T, Dv].

    Attributes:
        new_lens: int32 [B]: how many of a step's tokens are real; the others are padding behind.
    """

    new_lens: Tensor

    @property
    def room(self) -> None:
        return None

    def append(self, k: Tensor, v: Tensor, append: AppendKV, window: int | None) -> Keys:
        slots, count = self.k.shape[2], k.shape[2]
        assert window is not None and window <= slots
        before = self.seq_lens.expand(len(k))
        if count + window - 1 <= slots:
            # When the new ones are written, what the first of them sees is still there.
            append(k, v, self.k, self.v, before, ring=True, new_lens=self.new_lens, bits=self.bits)
            kv_lens = (before + count).clamp(max=slots)
            start = (before + count - kv_lens) % slots
            return self._keys(v, self.k, self.v, kv_lens=kv_lens, ring_start=start)
        held = before.clamp(max=slots)
        start = (before - held) % slots
        all_k, all_v = (
            torch.cat((from_ring(ring, start), _zeros(ring, len(ring), count)), 2)
            for ring in (self.k, self.v)
        )
        kv_lens = append(k, v, all_k, all_v, held, bits=self.bits)
        append(k, v, self.k, self.v, before, ring=True, new_lens=self.new_lens, bits=self.bits)
        return self._keys(v, all_k, all_v, kv_lens=kv_lens)


@dataclass(frozen=True)
class PagedKVCache(FixedKVCache):
    """All tokens, in pages of a pool: `k` [pages, G, page, D], `v` [pages, G, page, Dv].

    Attributes:
        block_table: int32 [B, N]: the page of the pool that holds page n of a row.
    """

    block_table: Tensor

    @property
    def rows(self) -> int:
        return int(self.block_table.shape[0])

    @property
    def room(self) -> int:
        return int(self.block_table.shape[1]) * int(self.k.shape[2])

    def append(self, k: Tensor, v: Tensor, append: AppendKV, window: int | None) -> Keys:
        table = self.block_table
        kv_lens = append(k, v, self.k, self.v, self.seq_lens, block_table=table, bits=self.bits)
        return self._keys(v, self.k, self.v, kv_lens=kv_lens, block_table=table)


KVCache: TypeAlias = tuple[Tensor, Tensor] | PagedKV | FixedKVCache
"""What a layer is given as its past: the first two grow by copying, and are not changed."""


def dense(keys: Keys, dim: int, dtype: torch.dtype) -> Keys:
    """Return keys with the values that rows of codes stand for in their place, of a dtype.

    Args:
        dim: Features of a key.
    """
    if keys.bits == 16:
        return keys
    k = unpack_rows(keys.k, dim, keys.bits, dtype)
    v = unpack_rows(keys.v, keys.values, keys.bits, dtype)
    return replace(keys, k=k, v=v, bits=16)


def in_order(keys: Keys) -> tuple[Tensor, Tensor]:
    """Return keys and values, [B, G, T, D] and [B, G, T, Dv], in the order of their tokens."""
    if keys.block_table is not None:
        return from_pages(keys.k, keys.block_table), from_pages(keys.v, keys.block_table)
    if keys.ring_start is not None:
        return from_ring(keys.k, keys.ring_start), from_ring(keys.v, keys.ring_start)
    return keys.k, keys.v


def tokens_held(cache: KVCache | PolicyKV) -> int:
    """Return how many tokens each row of a cache that grows holds.

    Raises:
        ValueError: The cache is of fixed room, and only the device knows.
    """
    if isinstance(cache, PolicyKV):
        return tokens_held(cache.kv)
    if isinstance(cache, PagedKV):
        return cache.length
    if isinstance(cache, FixedKVCache):
        raise ValueError("a cache of fixed room does not tell positions here: give position_ids")
    return int(cache[0].shape[2])


def growing_caches(
    empty: Sequence[tuple[Tensor, Tensor]],
    layouts: Sequence[Layout],
    policies: Sequence[object | None] = (),
) -> list[KVCache | PolicyKV]:
    """Return caches without tokens, of which the paged ones grow by pages.

    Args:
        empty: For each layer [B, G, 0, D] and [B, G, 0, Dv].
        layouts: For each layer.
        policies: For each layer None where no policy selects among its keys; by default for all.
    """
    caches: list[KVCache | PolicyKV] = []
    for number, ((k, v), (kind, size)) in enumerate(zip(empty, layouts, strict=True)):
        kv = PagedKV.empty(k, v, size) if kind == "paged" and size is not None else (k, v)
        selects = bool(policies) and policies[number] is not None
        caches.append(PolicyKV(kv, ()) if selects else kv)
    return caches


def fixed_caches(
    empty: Sequence[tuple[Tensor, Tensor]],
    layouts: Sequence[Layout],
    capacity: int,
    seq_lens: Tensor,
    new_lens: Tensor,
    bits: Sequence[int],
) -> list[FixedKVCache]:
    """Return caches without tokens, with room for `capacity` tokens a row.

    Args:
        empty: For each layer [B, G, 0, D] and [B, G, 0, Dv].
        layouts: For each layer. A ring has its slots, whatever the capacity.
        seq_lens: int32 [B], read at every step.
        new_lens: int32 [B], as `RingKVCache.new_lens`.
        bits: For each layer 4 or 8 where it holds codes, else 16.
    """
    batch, device = len(seq_lens), seq_lens.device
    made: list[FixedKVCache] = []
    for (k, v), (kind, size), own in zip(empty, layouts, bits or [16] * len(layouts), strict=True):
        if own < 16:
            k, v = (
                x.new_empty(*x.shape[:3], row_bytes(x.shape[3], own), dtype=torch.uint8)
                for x in (k, v)
            )
        if kind == "paged" and size is not None:
            count = -(-capacity // size)
            table = torch.arange(batch * count, dtype=torch.int32, device=device).view(count, batch)
            table = table.t().contiguous()
            pool_k, pool_v = (_zeros(x, batch * count, size) for x in (k, v))
            made.append(PagedKVCache(pool_k, pool_v, seq_lens, table, bits=own))
        elif kind == "ring" and size is not None:
            ring_k, ring_v = (_zeros(x, batch, size) for x in (k, v))
            made.append(RingKVCache(ring_k, ring_v, seq_lens, new_lens, bits=own))
        else:
            room_k, room_v = (_zeros(x, batch, capacity) for x in (k, v))
            made.append(StaticKVCache(room_k, room_v, seq_lens, bits=own))
    return made


def _zeros(like: Tensor, rows: int, tokens: int) -> Tensor:
    """Return memory of [rows, G, tokens, D], for the heads of `like` [B, G, .., D]."""
    return like.new_zeros(rows, like.shape[1], tokens, like.shape[3])
