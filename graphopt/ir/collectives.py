"""Collectives of a program's ranks, by torch.distributed.

A program has one group, which is all ranks of the process group that torch.distributed was
initialised with. Ranks run one text, so that they come to the same collectives in the same order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir import functional


def check_group(ranks: int) -> None:
    """Check that this process is one of as many ranks.

    Raises:
        UsageError: torch.distributed is not initialised, or with another number of ranks.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise UsageError(
            f"This program runs on {ranks} ranks, and this process is none of a group.",
            f"Start it with torchrun --nproc-per-node {ranks}.",
        )
    if dist.get_world_size() != ranks:
        raise UsageError(
            f"This program runs on {ranks} ranks, and the group has {dist.get_world_size()}.",
            f"Start it with torchrun --nproc-per-node {ranks}.",
        )


def all_reduce(x: Tensor, *, ranks: int) -> Tensor:
    """Return the sum of x over the ranks.

    Raises:
        UsageError: This process is not one of so many ranks.
    """
    check_group(ranks)
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def linear_all_reduce(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, ranks: int
) -> Tensor:
    """Return the sum over the ranks of x weight^T + bias.

    Raises:
        UsageError: This process is not one of so many ranks.
    """
    return all_reduce(functional.linear(x, weight, bias), ranks=ranks)


def attention_linear_all_reduce(x: Tensor, weight: Tensor, *, ranks: int) -> Tensor:
    """Return the sum over the ranks of x weight^T, x [B, H, S, D] the output of an attention.

    Raises:
        UsageError: This process is not one of so many ranks.
    """
    return linear_all_reduce(functional.merge_heads(x), weight, ranks=ranks)


def all_gather(x: Tensor, *, axis: int, ranks: int) -> Tensor:
    """Return the ranks' x one behind the other along an axis.

    Raises:
        UsageError: This process is not one of so many ranks.
    """
    check_group(ranks)
    own = x.contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(parts, own)
    return torch.cat(parts, axis)


def reduce_scatter(x: Tensor, *, axis: int, ranks: int) -> Tensor:
    """Return this rank's part along an axis of the sum of x over the ranks.

    Raises:
        UsageError: This process is not one of so many ranks.
    """
    check_group(ranks)
    if dist.get_backend() == "gloo":  # which has no reduce_scatter in every version of torch
        return all_reduce(x, ranks=ranks).chunk(ranks, axis)[dist.get_rank()]
    own = torch.stack(x.chunk(ranks, axis)).contiguous()
    part = torch.empty_like(own[0])
    dist.reduce_scatter_tensor(part, own)
    return part
