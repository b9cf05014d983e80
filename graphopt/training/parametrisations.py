"""What a weight is while it is trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graphopt.execute.block_runner import Parametrisation

FOLLOWED = 0.1
"""The share of its gradient by which a bias of thresholds moves in a step: a batch's is noisy."""


class FullParametrisation(Parametrisation):
    """Every element of the weight is trained.

    Args:
        rate: What the schedule's learning rate is times.
    """

    def __init__(self, value: Tensor, rate: float = 1.0) -> None:
        super().__init__()
        self.value, self.rate = nn.Parameter(value.clone()), rate

    def forward(self) -> Tensor:
        return self.value

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        return [(self.rate, [self.value])]


class LowRankParametrisation(Parametrisation):
    """W + B A, B [out, rank] from 0 and A [rank, in] (Hu et al., arXiv 2106.09685, section 4)."""

    def __init__(self, value: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out, width = value.shape
        self.base = nn.Buffer(value)
        self.down = nn.Parameter(kaiming((rank, width), generator).to(value.device))
        self.up = nn.Parameter(value.new_zeros(out, rank))

    def forward(self) -> Tensor:
        return self.base + self.up @ self.down


class LoadBalanceBias(Parametrisation):
    """The bias by which a choice of experts is balanced: it moves by `gamma` against its gradient.

    Only the gradient's sign counts. `top_k_gating` makes it the excess of every expert's load
    (`graphopt.ir.ops.experts.TopKGating`), so that an expert of more than the mean load is chosen
    less often from then on. Source: CMoE, arXiv 2502.04416, section 4.4.

    With `gamma=None`, for thresholds, it follows its gradient, of which a step takes a part.
    """

    def __init__(self, value: Tensor, gamma: float | None) -> None:
        super().__init__()
        self.value, self.gamma = nn.Parameter(value.clone()), gamma

    def forward(self) -> Tensor:
        return self.value

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        return []

    def step(self) -> None:
        gradient = self.value.grad
        if gradient is not None:
            by = FOLLOWED * gradient if self.gamma is None else self.gamma * gradient.sign()
            self.value.data.sub_(by)


def kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return a matrix uniform in +-1/sqrt(columns): He et al.'s for a slope of sqrt(5)."""
    bound = 1 / math.sqrt(shape[1])
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
