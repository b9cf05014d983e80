"""FuseGPT's injection: a removed block's weights in its neighbours, times low-rank coefficients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphopt.errors import PassError
from graphopt.execute.block_runner import Parametrisation
from graphopt.ir.graph import Call, Program
from graphopt.passes.fuse_blocks.donor import Donor
from graphopt.training.parametrisations import kaiming

PUBLISHED_RATE = 1e-3
PUBLISHED_OTHERS = 9.65e-6 / PUBLISHED_RATE
"""The paper's learning rates: of coefficients, and of everything else relative to them."""


def donation(
    donor: Donor, own: Tensor, pruned: Tensor, generator: torch.Generator
) -> Tensor | None:
    """Return what coefficients multiply; None for nothing."""
    if donor == "none":
        return None
    if donor == "self":
        return own
    if donor == "pruned":
        return pruned
    noise = torch.randn(pruned.shape, generator=generator).to(pruned.device)
    return noise * pruned.std()


class Injection(Parametrisation):
    """W + B A + (C_l C_r) * W_donor, elementwise: FuseGPT, arXiv 2411.14507, equations 3 and 4.

    C_l and B are 0 at first, so that the start is plain removal; W and W_donor stay as they are.
    Without a donor the coefficients' parameters go into a second low-rank term, so that both
    parametrisations have as many.
    """

    def __init__(
        self, value: Tensor, donor: Tensor | None, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        out, width = value.shape
        self.base = nn.Buffer(value)
        self.donor = None if donor is None else nn.Buffer(donor)
        self.coefficients_left = nn.Parameter(value.new_zeros(out, rank))
        self.coefficients_right = nn.Parameter(kaiming((rank, width), generator).to(value.device))
        self.up = nn.Parameter(value.new_zeros(out, rank))
        self.down = nn.Parameter(kaiming((rank, width), generator).to(value.device))

    def forward(self) -> Tensor:
        coefficients = self.coefficients_left @ self.coefficients_right
        injected = coefficients if self.donor is None else coefficients * self.donor
        value: Tensor = self.base + self.up @ self.down + injected
        return value

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        coefficients = [self.coefficients_left, self.coefficients_right]
        if self.donor is None:
            return [(PUBLISHED_OTHERS, [*coefficients, self.up, self.down])]
        return [(1.0, coefficients), (PUBLISHED_OTHERS, [self.up, self.down])]


def group_of(place: int, neighbours: int, count: int) -> tuple[int, int]:
    """Return the first and the last block of the group around one, from 0.

    Source: FuseGPT, arXiv 2411.14507, equation 2: `neighbours` + 1 consecutive blocks, half of
    the neighbours (rounded down) in front, moved to lie inside the model; all blocks where
    there are no more.
    """
    if count <= neighbours + 1:
        return 0, count - 1
    first = min(max(place - neighbours // 2, 0), count - neighbours - 1)
    return first, first + neighbours


def require_equal(program: Program, calls: list[Call]) -> None:
    """Refuse blocks that cannot be fused into each other.

    Raises:
        PassError: Naming the first pair and what differs.
    """
    first = calls[0]
    for call in calls[1:]:
        pair = f"{first.path or first.function!r} and {call.path or call.function!r}"
        remedy = "Use mode=distil, which needs no equal blocks, or a lower group."
        if call.function != first.function:
            raise PassError(
                f"{pair} are of different kinds ({first.function} and {call.function}) and cannot "
                "be fused.",
                remedy,
            )
        for slot, name in first.weights.items():
            ours, theirs = program.weights[name].shape, program.weights[call.weights[slot]].shape
            if ours != theirs:
                raise PassError(f"{pair} cannot be fused: {slot} is {ours} and {theirs}.", remedy)
