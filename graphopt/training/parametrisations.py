"""What a weight is while it is trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graphopt.execute.block_runner import Parametrisation
from graphopt.ir.graph import Call, Program
from graphopt.ir.weights import Array
from graphopt.pass_manager.contract import Skip

SAMPLED = 65536
"""Elements of a weight by which its scale is told."""
LEAST_SCALE = 1e-3
"""What a weight counts as whose elements are smaller, such as one that begins at 0."""

FOLLOWED = 0.1
"""The share of its gradient by which a bias of thresholds moves in a step: a batch's is noisy."""


def weight_scale(value: Tensor) -> float:
    """Return how large a weight's elements are, as what a step of its training is measured in.

    Adam moves every element by about the learning rate, whatever the gradient's size, so that one
    rate is a small step for one weight and a large one for another: matrices have elements of 0.2
    in SmolLM2 and of 0.04 in Gemma 3, whose gains of norms reach 300. Relative to a weight's own
    scale it is the same step everywhere. Source: Shazeer and Stern, Adafactor, arXiv 1804.04235,
    section 8; in the place of the root mean square, which a few huge elements decide, here is the
    standard deviation of the normal distribution that has the median of the magnitudes.

    Returns:
        A power of the root of two, so that few groups of weights have rates of their own.
    """
    flat = value.detach().flatten()
    size = float(flat[:: -(-len(flat) // SAMPLED)].float().abs().median()) / 0.6745
    return float(2.0 ** (round(2 * math.log2(max(size, LEAST_SCALE))) / 2))


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
    """W + B A, B [out, rank] from 0 and A [rank, in] (Hu et al., arXiv 2106.09685, section 4).

    Args:
        rate: What the schedule's learning rate is times.
    """

    def __init__(
        self, value: Tensor, rank: int, generator: torch.Generator, rate: float = 1.0
    ) -> None:
        super().__init__()
        self.rate = rate
        out, width = value.shape
        self.base = nn.Buffer(value)
        self.down = nn.Parameter(kaiming((rank, width), generator).to(value.device))
        self.up = nn.Parameter(value.new_zeros(out, rank))

    def forward(self) -> Tensor:
        return self.base + self.up @ self.down

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        return [(self.rate, [self.up, self.down])]


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
        self.counts = gamma is not None

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


def parametrisations_of(
    program: Program, calls: list[Call], device: torch.device, seed: int, *, rank: int | None
) -> tuple[dict[str, Parametrisation], list[Skip]]:
    """Return what is trained of calls: every weight of theirs, but none used elsewhere.

    Args:
        device: Where they are trained.
        seed: Of the terms of a rank.
        rank: Of the term that is trained of a matrix; None to train all of it.

    Returns:
        By the names of the weights, and the weights that are left out.
    """
    owners: dict[str, set[int]] = {}
    for number, call in enumerate(program.calls):
        for name in call.weights.values():
            owners.setdefault(name, set()).add(number)
    inside = {number for number, call in enumerate(program.calls) if call in calls}
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Parametrisation] = {}
    left: list[Skip] = []
    for name in (name for call in calls for name in call.weights.values()):
        weight = program.weights[name]
        if weight.constant or name in found or not weight.dtype.is_floating_point:
            continue
        if not owners[name] <= inside:
            left.append(Skip(name, "it is used outside the blocks too"))
            continue
        value = weight.load(torch.float32).to(device)
        # A router has few rows, which are no more than a term of them would be.
        if rank is not None and value.dim() == 2 and rank < min(value.shape):
            scale = weight_scale(value)
            found[name] = LowRankParametrisation(value, rank, generator, scale)
        else:
            found[name] = FullParametrisation(value, weight_scale(value))
    return found, left


def assign(program: Program, name: str, value: Tensor) -> None:
    """Give a program's weight a new value of the same shape, kept in fp32."""
    weight = program.weights[name]
    array = Array(value.detach().to(torch.float32).clone())
    program.weights.replace(weight.with_producer(array))
