"""Memory of a rank's GPU that the GPUs of the other ranks read and write, over their links.

It is torch's symmetric memory. Its multicast is not used: kernels load from peers and store to
them. Allocating it is a collective: all ranks ask for the same, in the same order.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.runtime.fused import OLDEST

ALIGNMENT = 1024
"""Bytes of which the offset of every part of a workspace is a multiple."""


@dataclass(frozen=True)
class PeerMemory:
    """A workspace of the same layout on every rank.

    Attributes:
        rank: The one that this process is.
        workspaces: uint8 [bytes], that of every rank as this one sees it.
        bases: int64 [ranks], where each begins, on this rank's GPU.
        keeps: What must live as long.
    """

    rank: int
    workspaces: tuple[Tensor, ...]
    bases: Tensor
    keeps: object = None

    @property
    def ranks(self) -> int:
        return len(self.workspaces)

    def part(
        self, offset: int, shape: Sequence[int], dtype: torch.dtype, rank: int | None = None
    ) -> Tensor:
        """Return what lies `offset` bytes into a rank's workspace, this one's by default."""
        size = math.prod(shape) * dtype.itemsize
        whole = self.workspaces[self.rank if rank is None else rank]
        return whole[offset : offset + size].view(dtype).view(*shape)


class Layout:
    """Offsets of the parts of a workspace, one behind the other."""

    def __init__(self) -> None:
        self.bytes = 0

    def add(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the offset of a further part."""
        offset = self.bytes
        size = math.prod(shape) * dtype.itemsize
        self.bytes += -(-size // ALIGNMENT) * ALIGNMENT
        return offset


class Places:
    """Parts of a workspace that take turns, so that a result holds while the next is made.

    Args:
        room: Rows of a part.
        count: How many there are.
    """

    def __init__(
        self, layout: Layout, room: int, columns: int, dtype: torch.dtype, count: int
    ) -> None:
        self.room, self.columns, self.dtype = room, columns, dtype
        self._offsets = [layout.add((room, columns), dtype) for _ in range(count)]
        self._turn = 0

    @property
    def offset(self) -> int:
        """Bytes into the workspace of the part whose turn it is."""
        return self._offsets[self._turn]

    def of(self, memory: PeerMemory, rows: int, rank: int | None = None) -> Tensor:
        """Return [rows, columns] in the part of a rank, this one's by default, whose turn it is."""
        return memory.part(self.offset, (rows, self.columns), self.dtype, rank)

    def turn(self) -> None:
        """Go on to the next."""
        self._turn = (self._turn + 1) % len(self._offsets)


@dataclass(frozen=True)
class Peers:
    """Ranks whose devices reach each other's memory.

    Attributes:
        ranks: How many.
        device: That of this one.
        cores: That each device has at least, for programs of a rank that run at once.
        allocate: From a number of bytes to workspaces of that size, all zeros, on all ranks.
    """

    ranks: int
    device: torch.device
    cores: int
    allocate: Callable[[int], PeerMemory]


def peers_of(group: dist.ProcessGroup, device: torch.device) -> Peers:
    """Return the ranks of a group. A collective of it, and so is each allocation.

    Args:
        device: The GPU of this rank, which is the current one.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    def allocate(size: int) -> PeerMemory:
        own = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        handle = symmetric_memory.rendezvous(own, group)
        own.zero_()
        torch.cuda.synchronize(device)
        # No rank signals another before that one's flags are 0.
        dist.barrier(group)
        torch.cuda.synchronize(device)
        workspaces = tuple(
            own if rank == handle.rank else handle.get_buffer(rank, (size,), torch.uint8)
            for rank in range(handle.world_size)
        )
        bases = torch.tensor([t.data_ptr() for t in workspaces], dtype=torch.int64, device=device)
        return PeerMemory(handle.rank, workspaces, bases, (own, handle))

    own_cores = torch.cuda.get_device_properties(device).multi_processor_count
    cores = [own_cores] * dist.get_world_size(group)
    dist.all_gather_object(cores, own_cores, group)
    return Peers(len(cores), device, min(cores), allocate)


def on_one_device(ranks: int, device: torch.device | str) -> list[Peers]:
    """Return each of some ranks, all on one device: to try kernels where there are no peers.

    Each has to allocate the same, in the same order.
    """
    where = torch.device(device)
    made: list[tuple[Tensor, ...]] = []

    def allocate_for(rank: int) -> Callable[[int], PeerMemory]:
        counter = itertools.count()

        def allocate(size: int) -> PeerMemory:
            index = next(counter)
            if index == len(made):
                whole = [
                    torch.zeros(size + ALIGNMENT, dtype=torch.uint8, device=where)
                    for _ in range(ranks)
                ]
                made.append(tuple(t[-t.data_ptr() % ALIGNMENT :][:size] for t in whole))
            workspaces = made[index]
            bases = torch.tensor([t.data_ptr() for t in workspaces], device=where)
            return PeerMemory(rank, workspaces, bases)

        return allocate

    cores = ranks
    if where.type == "cuda":
        cores = torch.cuda.get_device_properties(where).multi_processor_count
    return [Peers(ranks, where, cores // ranks, allocate_for(rank)) for rank in range(ranks)]


def why_out_of_reach(group: dist.ProcessGroup) -> str | None:
    """Return why the GPUs of a group do not reach each other's memory; None where they do.

    A collective of the group the first time, by which all ranks get the same answer.
    """
    return _why_out_of_reach(group)


@functools.cache
def _why_out_of_reach(group: dist.ProcessGroup) -> str | None:
    here = (socket.gethostname(), _why_not_here())
    all_of: list[tuple[str, str | None]] = [here] * dist.get_world_size(group)
    dist.all_gather_object(all_of, here, group)
    for rank, (_, reason) in enumerate(all_of):
        if reason is not None:
            return f"rank {rank}: {reason}"
    hosts = {host for host, _ in all_of}
    if len(hosts) > 1:
        return f"ranks run on several hosts: {', '.join(sorted(hosts))}"
    return None


def _why_not_here() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.cuda.get_device_capability() < OLDEST:
        return f"Triton does not support {torch.cuda.get_device_name()}"
    own = torch.cuda.current_device()
    for other in range(torch.cuda.device_count()):
        if other != own and not torch.cuda.can_device_access_peer(own, other):
            return f"cuda:{own} has no access to the memory of cuda:{other}"
    return None
