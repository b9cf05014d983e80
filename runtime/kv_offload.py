"""Keys and values in host memory, of which a device has the pages that a step reads.

Each layer has all its pages in pinned host memory, and on the device a pool with twice as many
slots as a step reads pages. As soon as a step knows what the next one reads, the pages that are not
there are copied into slots that nothing reads: on a stream of their own, while the rest of the
token is computed. An event tells the next step of the layer that its pages are there. What is
copied is the difference of two sets, page for page.

A step that reads everything (calibration, or no policy) gets a whole layer in one of two buffers,
filled while the layers in front compute, on another stream: pages do not queue behind layers.

A step can be recorded in a CUDA graph, which begins and ends with no copy on its way (`settle`).

Every key head of every row reads pages of its own: for the attention it is a row with one key head.

Layout letters as in `graphopt.ir.kv_policies.pages`, and L layers, R = B G rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.ir.kv_policies.base import KVHeads, KVPolicy, State
from graphopt.ir.kv_policies.pages import Filled
from graphopt.ir.kv_policies.probabilities import Scoring
from graphopt.runtime import kv_policy
from graphopt.runtime.attention import Keys
from graphopt.runtime.copies import Copies, copies_on, pin
from graphopt.runtime.kv_slots import Places, fetch, find_slots, find_slots_by_kernel, write_token
from graphopt.support.free_memory import free_bytes
from graphopt.support.quantities import format_bytes


def host_bytes(layers: int, batch: int, heads: KVHeads, capacity: int, page: int) -> int:
    """Return the bytes of host memory that keys and values take, pages rounded up."""
    tokens = -(-capacity // page) * page
    return layers * batch * heads.key_heads * tokens * (heads.k_dim + heads.v_dim) * _size(heads)


def page_bytes(heads: KVHeads, page: int) -> int:
    """Return the bytes of a page of one key head, keys and values."""
    return page * (heads.k_dim + heads.v_dim) * _size(heads)


def _size(heads: KVHeads) -> int:
    return torch.empty(0, dtype=heads.dtype).element_size()


@dataclass
class _Layer:
    """What there is of a layer, and which copies are on their way.

    Attributes:
        host: Keys and values [R, N, page, D], pinned.
        pool: Those of the slots [R S, 1, page, D].
        places: Which pages lie in which slots.
        fetched: The copy of those, with what it reads, until somebody has waited for it.
        staged: Number of the buffer with the whole layer, and its copy.
    """

    host: tuple[Tensor, Tensor]
    pool: tuple[Tensor, Tensor]
    places: Places
    fetched: tuple[Any, tuple[Tensor, ...]] | None = None
    staged: tuple[int, Any] | None = None


class OffloadedKV:
    """Keys and values of all layers in host memory, and on a device what a step reads.

    A step of a layer is `wait`, `append`, attention over `keys` (or `all_keys`, after `stage`), and
    `prefetch` of what the next step reads.

    Args:
        layers, batch: L and B.
        capacity: Tokens that a row has room for.
        page: Tokens of a page.
        read: M, pages that a step reads for each key head.
        copies: What runs copies; by default two streams on a GPU, for pages and for layers.

    Attributes:
        pages_moved: int64 tensor: pages of one key head that were copied by `prefetch`.
        layers_moved: int64 tensor: how often a whole layer was copied by `stage`.

    Raises:
        GraphoptError: The host has less memory than `host_bytes`. Nothing is allocated then.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: KVHeads,
        capacity: int,
        *,
        page: int,
        read: int,
        device: torch.device,
        copies: Copies | None = None,
    ) -> None:
        needed = host_bytes(layers, batch, heads, capacity, page)
        free = free_bytes(torch.device("cpu"))
        if needed > free:
            raise GraphoptError(
                f"Keys and values of {capacity:,} tokens in {layers} layers take {needed:,} bytes "
                f"({format_bytes(needed)}) of host memory, and {format_bytes(free)} are free.",
                "Lower the capacity or the batch, or keep them on the device.",
            )
        self.heads, self.page, self.read, self.device = heads, page, read, device
        self.batch, self.rows = batch, batch * heads.key_heads
        self.pages, self.slots = -(-capacity // page), 2 * read
        on_gpu = device.type == "cuda"
        self._copies = copies_on(device) if copies is None else copies
        self._stages = copies_on(device) if copies is None else copies
        self.pages_moved, self.layers_moved = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)
        )
        dims = (heads.k_dim, heads.v_dim)

        def memory(*shape: int) -> tuple[Tensor, Tensor]:
            k, v = (
                torch.zeros(*shape, page, dim, dtype=heads.dtype, device=device) for dim in dims
            )
            return k, v

        host = torch.zeros(needed // _size(heads), dtype=heads.dtype)
        if on_gpu:
            pin(host, self)
        sizes = [self.rows * self.pages * page * dim for dim in dims] * layers
        parts = [part.view(self.rows, self.pages, page, -1) for part in host.split(sizes)]
        self._layers = [
            _Layer(
                (parts[2 * layer], parts[2 * layer + 1]),
                memory(self.rows * self.slots, 1),
                Places.nowhere(self.rows, self.pages, read, device),
            )
            for layer in range(layers)
        ]
        self._buffers = [memory(self.rows * self.pages, 1) for _ in range(2)]
        count = self.rows * self.pages
        everything = torch.arange(count, dtype=torch.int32, device=device)
        self._whole_table = everything.view(self.rows, self.pages)

    @property
    def bytes_moved(self) -> int:
        """Bytes that were copied to the device so far: pages, and whole layers."""
        whole = self.rows * self.pages * int(self.layers_moved)
        return (int(self.pages_moved) + whole) * page_bytes(self.heads, self.page)

    def moved(self) -> list[Tensor]:
        """Return what a step writes beside keys and values: which pages lie where, and counts.

        Pages in slots that no place speaks of are never read: with these as they were before a
        step, it can be run again.
        """
        places = [x for own in self._layers for x in own.places.moved()]
        return [self.pages_moved, self.layers_moved, *places]

    def fill(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> None:
        """Put the keys and values of a text's front into host memory.

        Pages on the device are forgotten: they may hold those of another text.
        """
        self.wait(layer)
        self._layers[layer].places.forget()
        for host, given in zip(self._layers[layer].host, (k_BGTD, v_BGTD), strict=True):
            # Row by row, each without gaps: copied from a device without a detour.
            for row, own in zip(host, given.flatten(0, 1), strict=True):
                row.view(-1, row.shape[2])[: len(own)].copy_(own)

    def host_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return all keys and values of a layer [R, N, page, D], as they lie in host memory."""
        return self._layers[layer].host

    def prefetch(self, layer: int, selected_BGM: Tensor) -> None:
        """Begin to bring the pages that the layer's next step reads.

        Args:
            selected_BGM: int64, each page once, -1 for none; [B, 1, M] where all heads read the
                same.
        """
        own = self._layers[layer]
        self.wait(layer)
        wanted = selected_BGM.expand(self.batch, self.heads.key_heads, -1)
        find = find_slots_by_kernel if self.device.type == "cuda" else find_slots
        source, slot = find(own.places, wanted, self.pages_moved)

        def copy() -> None:
            for host, pool in zip(own.host, own.pool, strict=True):
                fetch(host, pool.view(self.rows, self.slots, *host.shape[2:]), source, slot)

        # What the copy reads is kept until it has ended.
        own.fetched = self._copies.start(copy), (source, slot)

    def wait(self, layer: int) -> None:
        """Wait, on the device, for the pages that were asked for last."""
        own = self._layers[layer]
        if own.fetched is not None:
            self._copies.wait(own.fetched[0])
            own.fetched = None

    def settle(self) -> None:
        """Wait, on the device, for all pages that were asked for."""
        for layer in range(len(self._layers)):
            self.wait(layer)

    def stage(self, layer: int) -> None:
        """Begin to bring a whole layer.

        Raises:
            ValueError: Two are on their way or have not been read.
        """
        own = self._layers[layer]
        taken = {other.staged[0] for other in self._layers if other.staged is not None}
        if len(taken) == 2:
            raise ValueError("two layers are staged: read one of them before another is brought")
        buffer = 0 if 0 not in taken else 1

        def copy() -> None:
            for host, there in zip(own.host, self._buffers[buffer], strict=True):
                there.view(host.shape).copy_(host, non_blocking=True)

        own.staged = buffer, self._stages.start(copy)
        self.layers_moved += 1

    def append(self, layer: int, k_BG1D: Tensor, v_BG1D: Tensor, last_B: Tensor) -> None:
        """Write a token's key and value, to host memory and to wherever its page is.

        Args:
            last_B: int64, the place of the token in each row. Its page is among those that the step
                reads, where it reads selected ones.
        """
        own = self._layers[layer]
        self.wait(layer)
        staged: tuple[Tensor | None, Tensor | None] = (None, None)
        if own.staged is not None:
            self._stages.wait(own.staged[1])
            staged = self._buffers[own.staged[0]]
        for new, host, pool, buffer in zip(
            (k_BG1D, v_BG1D), own.host, own.pool, staged, strict=True
        ):
            write_token(new.reshape(self.rows, -1), host, pool, buffer, own.places.table, last_B)

    def keys(self, layer: int, last_B: Tensor) -> Keys:
        """Return the pages that a step reads, a row for each key head; waits for them."""
        own = self._layers[layer]
        self.wait(layer)
        return Keys(
            *own.pool, kv_lens=self._lens(last_B), block_table=own.places.table,
            selected_blocks=own.places.selected[:, None],
        )  # fmt: skip

    def all_keys(self, layer: int, last_B: Tensor) -> Keys:
        """Return all pages of a layer that was staged, a row for each key head.

        The buffer is free for another layer from then on: what reads it has to be asked for before
        `stage` is called again.
        """
        own = self._layers[layer]
        assert own.staged is not None
        buffer, copied = own.staged
        self._stages.wait(copied)
        own.staged = None
        return Keys(
            *self._buffers[buffer], kv_lens=self._lens(last_B), block_table=self._whole_table
        )

    def as_rows(self, q_BH1D: Tensor) -> Tensor:
        """Return queries with a row for each key head, [R, H / G, 1, D]."""
        return q_BH1D.reshape(self.rows, -1, *q_BH1D.shape[2:])

    def from_rows(self, x: Tensor) -> Tensor:
        """Return what an attention of such rows gives as that of the batch: [B, H, 1, ...]."""
        return x.reshape(self.batch, -1, *x.shape[2:])

    def _lens(self, last_B: Tensor) -> Tensor:
        return (last_B + 1).to(torch.int32).repeat_interleave(self.heads.key_heads)


Attend = Callable[[Tensor, Keys], tuple[Tensor, Tensor, Tensor]]
"""Attention of queries [R, H / G, 1, D]: its output, log-sum-exp and page maxima."""


def offloaded_step(
    kv: OffloadedKV,
    layer: int,
    policy: KVPolicy,
    state: State,
    new: tuple[Tensor, Tensor, Tensor],
    lengths: Filled,
    scoring: Scoring,
    attend: Attend,
    *,
    calibrating: bool = False,
) -> tuple[Tensor, State]:
    """Run a policy's step of one token of a layer, and bring what the next one reads.

    Where the policy needs the step's own query, the step waits for its pages; else they were asked
    for a token ago, in the first step by the caller.

    Args:
        new: The token's query [B, H, 1, D], key [B, G, 1, D] and value [B, G, 1, Dv].
        state: Kernels overwrite it.
        lengths: With the new token.
        calibrating: Read all pages, which `kv.stage` was asked to bring.

    Returns:
        The output [B, H, 1, Dv], and the state after the step.
    """
    q, k, v = new
    if policy.needs_query:
        kv.prefetch(layer, kv_policy.select(policy, state, q, None, lengths, scoring))
    kv.append(layer, k, v, lengths.last_B)
    keys = (kv.all_keys if calibrating else kv.keys)(layer, lengths.last_B)
    out, lse, page_max = (kv.from_rows(x) for x in attend(kv.as_rows(q), keys))
    if calibrating:
        state = kv_policy.calibrate(policy, state, page_max, lse, k, lengths, in_place=True)
    else:
        assert keys.selected_blocks is not None
        selected = keys.selected_blocks.view(kv.batch, -1, kv.read)
        state = kv_policy.observe(policy, state, selected, page_max, lse, k, lengths, in_place=True)
    if not policy.needs_query:
        after = Filled(lengths.first_B, lengths.last_B + 1, lengths.slots)
        kv.prefetch(layer, kv_policy.select(policy, state, None, None, after, scoring))
    return out, state
