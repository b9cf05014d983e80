"""Keys and values in memory: written behind those that are there, read in the order of tokens.

Plain torch, as `graphopt.ir.functional` is: what caches are checked against, and what emitted
models run where no kernel does it. Imports nothing of graphopt, and is copied into models.

Layout letters: B batch, S new tokens, T room of a cache, G key heads, D head size, N pages of a
row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


def append_kv(
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    seq_lens: Tensor,
    *,
    new_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    ring: bool = False,
    bits: int = 16,
) -> Tensor:
    """Write keys and values behind those that each row of a cache holds.

    Args:
        k, v: [B, G, S, D] and [B, G, S, Dv], of the new tokens.
        cache_k, cache_v: Written to: [B, G, T, D] and [B, G, T, Dv], or with `block_table`
            [pages, G, page, D] and [pages, G, page, Dv].
        seq_lens: int32 [B], or [1] for all rows: tokens before these.
        new_lens: int32 [B]: how many of the new tokens are real, where rows are padded behind; all
            by default. Only a ring asks: elsewhere the next tokens overwrite padding.
        block_table: int32 [B, N]: the page of the pool that holds page n of a row.
        ring: Token t lies in slot t mod T, so that the last T are kept.
        bits: 4 or 8 where the cache holds rows of codes (`pack_rows`), of uint8.

    Returns:
        int32 [B]: `seq_lens` and the new tokens, padding too.
    """
    if bits < 16:
        k, v = pack_rows(k, bits), pack_rows(v, bits)
    batch, _, count, _ = k.shape
    row = torch.arange(batch, device=k.device)[:, None]
    before = seq_lens.expand(batch)[:, None].long()
    position = before + torch.arange(count, device=k.device)
    for new, cache in ((k, cache_k), (v, cache_v)):
        tokens, held = new.transpose(1, 2), cache.transpose(1, 2)
        size = cache.shape[2]
        if block_table is not None:
            held[block_table.long().gather(1, position // size), position % size] = tokens
        elif not ring:
            held[row, position] = tokens
        elif count == 1:
            held[row, position % size] = tokens
        else:
            # Slot by slot, so that no shape depends on the lengths: the newest token that it is
            # for, if that is a new one.
            last = before + (count if new_lens is None else new_lens[:, None].long()) - 1
            newest = last - (last - torch.arange(size, device=k.device)) % size - before
            written = tokens[row, newest.clamp(min=0)]
            held.copy_(torch.where((newest >= 0)[..., None, None], written, held))
    return (seq_lens + count).expand(batch).to(torch.int32).contiguous()


def row_bytes(dim: int, bits: int) -> int:
    """The bytes of a key or value of `dim` features whose codes have so many bits.

    Its codes, its scale and its zero point in fp32, and what is left to a multiple of 16.
    """
    return -(-(dim * bits // 8 + 8) // 16) * 16


def pack_rows(x: Tensor, bits: int) -> Tensor:
    """Keys or values [..., D] rounded to rows of codes, uint8 [..., row_bytes(D, bits)].

    By the codes of `functional.quantise_dequantise` with zero points, each less the middle of the
    range. Of four bits a byte has in its low bits a feature of the first half, and in its high
    bits the one as far into the second half.
    """
    wide, most, middle = x.float(), 2**bits - 1, 2 ** (bits - 1)
    low = wide.amin(-1, keepdim=True).clamp(max=0)
    high = wide.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / most
    scale = scale.masked_fill(scale == 0, 1.0)
    zero = (-low / scale).round()
    scale = scale.masked_fill(~scale.isfinite(), float("nan"))
    codes = ((wide / scale).round() + zero).clamp(0, most).nan_to_num().to(torch.int16) - middle
    if bits == 4:
        first, second = (codes & 15).chunk(2, -1)
        codes = first | second << 4
    pair = torch.cat((scale, zero - middle), -1).contiguous().view(torch.uint8)
    rows = torch.cat(((codes & 255).to(torch.uint8), pair), -1)
    left = row_bytes(x.shape[-1], bits) - rows.shape[-1]
    return F.pad(rows, (0, left))


def unpack_rows(rows: Tensor, dim: int, bits: int, dtype: torch.dtype) -> Tensor:
    """What rows of codes stand for, [..., D] of a dtype."""
    size = dim * bits // 8
    codes = rows[..., :size]
    if bits == 4:
        signed = torch.cat((codes & 15, codes >> 4), -1).to(torch.int16)
        signed = torch.where(signed > 7, signed - 16, signed)
    else:
        signed = codes.view(torch.int8).to(torch.int16)
    scale, zero = rows[..., size : size + 8].contiguous().view(torch.float32).split(1, -1)
    return ((signed - zero) * scale).to(dtype)


def from_ring(cache: Tensor, ring_start: Tensor) -> Tensor:
    """The tokens [B, G, T, D] of a ring in their order.

    Args:
        cache: [B, G, T, D].
        ring_start: int [B]: the slot of each row's first token.
    """
    slots = cache.shape[2]
    order = (ring_start[:, None].long() + torch.arange(slots, device=cache.device)) % slots
    return cache.gather(2, order[:, None, :, None].expand_as(cache))


def from_pages(pool: Tensor, block_table: Tensor) -> Tensor:
    """The tokens [B, G, N page, D] of rows that lie in pages.

    Args:
        pool: [pages, G, page, D].
        block_table: int [B, N], the page of the pool that holds page n of a row.
    """
    return pool[block_table.long()].transpose(1, 2).flatten(2, 3)


@dataclass(frozen=True)
class PagedKV:
    """Keys and values in pages of a pool that grows; it unpacks to both in their tokens' order.

    Attributes:
        k: [pages, G, page, D].
        v: [pages, G, page, Dv].
        block_table: int32 [B, N], the page of the pool that holds page n of a row.
        length: Tokens of each row.
    """

    k: Tensor
    v: Tensor
    block_table: Tensor
    length: int = 0

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, page: int) -> PagedKV:
        """Return a pool without pages, for the heads of `k` [B, G, 0, D] and `v` [B, G, 0, Dv]."""
        pool_k, pool_v = (x.new_zeros(0, x.shape[1], page, x.shape[3]) for x in (k, v))
        table = torch.zeros(k.shape[0], 0, dtype=torch.int32, device=k.device)
        return cls(pool_k, pool_v, table)

    def __iter__(self) -> Iterator[Tensor]:
        for pool in (self.k, self.v):
            yield from_pages(pool, self.block_table)[:, :, : self.length]

    @property
    def lens(self) -> Tensor:
        """int32 [B]: the tokens of each row."""
        table = self.block_table
        return torch.full((len(table),), self.length, dtype=torch.int32, device=table.device)

    def extended(self, k: Tensor, v: Tensor) -> PagedKV:
        """Return a copy with new tokens `k` [B, G, S, D] and `v` [B, G, S, Dv] behind its own."""
        batch, pages = self.block_table.shape
        length = self.length + k.shape[2]
        room = batch * (-(-length // self.k.shape[2]) - pages)
        fresh = torch.arange(len(self.k), len(self.k) + room, device=k.device, dtype=torch.int32)
        # Rows take turns, as pages do that are handed out when they are needed.
        table = torch.cat((self.block_table, fresh.view(-1, batch).t()), 1)
        pool_k, pool_v = (
            torch.cat((pool, pool.new_zeros(room, *pool.shape[1:]))) for pool in (self.k, self.v)
        )
        append_kv(k, v, pool_k, pool_v, self.lens, block_table=table)
        return replace(self, k=pool_k, v=pool_v, block_table=table, length=length)


@dataclass(frozen=True)
class PolicyKV:
    """Keys and values, and the state of the policy that says which of their pages are read.

    It unpacks to keys and values, as other caches do.

    Attributes:
        kv: Keys [B, G, P, D] and values [B, G, P, Dv], or pages of a pool.
        state: The policy's tensors, in the order in which it names them.
    """

    kv: tuple[Tensor, Tensor] | PagedKV
    state: tuple[Tensor, ...]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.kv
