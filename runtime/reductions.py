"""What ranks sum: by kernels through each other's memory, or by torch.distributed.

16-bit tensors on GPUs that reach each other go to kernels, by the plan for their shape; everything
else (CPUs, fp32, GPUs of several hosts or without access to each other) goes to torch.distributed,
and it is said why, once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.ir import functional
from graphopt.runtime.attention_rows import AttentionRows
from graphopt.runtime.fused import HALF
from graphopt.runtime.peer_linear import (
    ChunkedLinear,
    PersistentLinear,
    SummedLinear,
    copies_tiles,
)
from graphopt.runtime.peer_memory import Peers, peers_of, why_out_of_reach
from graphopt.runtime.peer_reduce import OneShot, TwoShot, Waiting
from graphopt.runtime.reduction_plan import (
    LEAST_CHUNK,
    CausalAttention,
    LinearPlan,
    ReductionFigures,
    plan_attention_linear,
    plan_linear,
)

T = TypeVar("T")


class RankReductions:
    """The functions of a model that sum over its ranks.

    The group is the one that torch.distributed was initialised with, and all its ranks make the
    same calls in the same order. Workspaces are made when a shape is first met, by all ranks
    together: run a step once before it is recorded in a CUDA graph. What a function returns may lie
    in a workspace, and holds until the second call after it with as many
    features; use it, or copy it, before. It is the same on all ranks, to the bit.

    Args:
        figures: Of the target; None where its file has none, for torch.distributed alone.
        given: The ranks, where they are not those of the group, and how they wait.
    """

    def __init__(
        self, figures: ReductionFigures | None, given: tuple[Peers, Waiting] | None = None
    ) -> None:
        self._figures, self._given = figures, given
        self._made: dict[tuple[Any, ...], Any] = {}
        self._said: set[str] = set()
        self._plans: dict[tuple[int, int, int, bool], LinearPlan] = {}
        self._attention_plans: dict[tuple[CausalAttention, int, int], tuple[int, ...] | None] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x [..., N] over the ranks; x may be written over."""
        reach = self._reach(x)
        if reach is None:
            return _by_library(x)
        figures, peers, waiting = reach
        if x.numel() * x.itemsize <= figures.one_shot_bytes:
            one_shot = self._kept(
                ("one-shot", x.numel()), lambda: OneShot(peers, x.numel(), waiting)
            )
            return one_shot(x)
        rows, columns = x.numel() // x.shape[-1], x.shape[-1]
        room = _room(rows)
        two_shot = self._kept(
            ("two-shot", room, columns, x.dtype),
            lambda: TwoShot(peers, room, columns, x.dtype, figures.programs, waiting),
        )
        two_shot.operand(rows).copy_(x.reshape(rows, columns))
        return two_shot(rows).view(x.shape)

    def linear_all_reduce(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the sum over the ranks of x weight^T + bias, by the plan for their shape.

        Args:
            x: [..., K], a rank's part of the features.
            weight: [N, K].
            bias: [N], of which the sum over the ranks is added.
        """
        reach = self._reach(x)
        if reach is None or weight.dtype != x.dtype or weight.shape[0] % 2:
            return self.all_reduce(functional.linear(x, weight, bias))
        figures, peers, waiting = reach
        rows, (columns, depth) = x.numel() // x.shape[-1], weight.shape
        plan = self._plan(rows, columns, depth, bias is not None, figures, peers.ranks)
        if plan.how in ("one-shot", "library"):
            product = functional.linear(x, weight, bias)
            if plan.how == "library":
                return _by_library(product)
            return self.all_reduce(product)
        flat, kind, room = _rows_of(x), x.dtype, _room(rows)
        shape = (room, columns, kind)
        if plan.chunks is not None:
            out = self._chunked(*shape, peers, waiting)(flat, weight, plan.chunks)
        elif plan.tiles is not None and copies_tiles(x.device):
            tiles, cores = plan.tiles, min(figures.cores, peers.cores)
            persistent = self._kept(
                ("persistent", *shape, tiles),
                lambda: PersistentLinear(peers, *shape, tiles, cores, waiting),
            )
            out = persistent(flat, weight.contiguous(), bias)
        else:
            summed = self._kept(
                ("summed", *shape), lambda: SummedLinear(peers, *shape, figures.programs, waiting)
            )
            out = summed(flat, weight, bias)
        return out.view(*x.shape[:-1], columns)

    def attention_linear_all_reduce(self, attention: AttentionRows, weight: Tensor) -> Tensor:
        """Return the sum over the ranks of x weight^T, where x [B, S, K] is attention's output.

        Where the plan is one of chunks, attention of the next rows runs while what was made of
        those before is sent; else attention is computed as a whole.

        Args:
            attention: Of a rank's heads.
            weight: [N, K].

        Source: FastAttention, arXiv 2410.16663, tiling-AllReduce.
        """
        made = self._overlapped(attention, weight)
        return self.linear_all_reduce(attention.whole(), weight) if made is None else made

    def _overlapped(self, attention: AttentionRows, weight: Tensor) -> Tensor | None:
        """Return what `attention_linear_all_reduce` gives in chunks; None by any other plan."""
        described, (columns, depth) = attention.described, weight.shape
        batch, _, tokens, _ = attention.q.shape
        rows = batch * tokens
        if described is None or rows < 2 * LEAST_CHUNK or attention.q.dtype != weight.dtype:
            return None
        reach = self._reach(weight)
        if reach is None:
            return None
        figures, peers, waiting = reach
        key = (described, columns, depth)
        if key not in self._attention_plans:
            plan = plan_attention_linear(described, columns, depth, peers.ranks, figures)
            self._attention_plans[key] = plan.chunks if plan.how == "attention-chunks" else None
        chunks = self._attention_plans[key]
        if chunks is None:
            return None
        chunked = self._chunked(_room(2 * sum(chunks)), columns, weight.dtype, peers, waiting)
        return chunked(attention.rows, weight, chunks)[:rows].view(batch, tokens, columns)

    def _chunked(
        self, room: int, columns: int, dtype: torch.dtype, peers: Peers, waiting: Waiting
    ) -> ChunkedLinear:
        return self._kept(
            ("chunks", room, columns, dtype),
            lambda: ChunkedLinear(peers, room, columns, dtype, waiting),
        )

    def _plan(
        self, rows: int, columns: int, depth: int, bias: bool, figures: ReductionFigures, ranks: int
    ) -> LinearPlan:
        key = (rows, columns, depth, bias)
        if key not in self._plans:
            self._plans[key] = plan_linear(rows, columns, depth, ranks, figures, bias=bias)
        return self._plans[key]

    def _kept(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Return what was made for a key, made the first time.

        Raises:
            RuntimeError: A CUDA graph is being recorded.
        """
        if key not in self._made:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a CUDA graph cannot record the first sum of a shape over the ranks, which "
                    "allocates memory with them: run the step once before it is recorded"
                )
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def _reach(self, x: Tensor) -> tuple[ReductionFigures, Peers, Waiting] | None:
        """Return what kernels are given; None where torch.distributed sums."""
        if self._figures is None or x.dtype not in HALF or x.numel() == 0 or x.shape[-1] % 2:
            return None
        if not (x.is_cuda or self._given):
            return None
        if self._given is not None:
            return self._figures, *self._given
        peers = self._peers()
        if peers is None:
            return None
        return self._figures, peers, self._waiting(peers.device)

    def _peers(self) -> Peers | None:
        peers = self._kept(("peers",), _peers_of_all)
        if isinstance(peers, str):
            if peers not in self._said:
                self._said.add(peers)
                warnings.warn(f"{peers}: torch.distributed sums over the ranks", stacklevel=4)
            return None
        return peers

    def _waiting(self, device: torch.device) -> Waiting:
        return self._kept(("waiting",), lambda: Waiting(device))


def _peers_of_all() -> Peers | str:
    """Return the ranks of the group that there is, or why they do not reach each other."""
    group = dist.group.WORLD
    assert group is not None
    reason = why_out_of_reach(group)
    return reason or peers_of(group, torch.device("cuda", torch.cuda.current_device()))


def _by_library(x: Tensor) -> Tensor:
    """Return the sum of x over the ranks, written over it, by torch.distributed."""
    whole = x.contiguous()
    dist.all_reduce(whole)
    return whole


def _room(rows: int) -> int:
    """Return the rows of the workspace that a shape is given: few sizes serve all of them."""
    return max(128, 1 << math.ceil(math.log2(rows)))


def _rows_of(x: Tensor) -> Tensor:
    """Return [..., K] as [M, K], the last axis contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
