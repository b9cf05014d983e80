"""How much each expert of a mixture adds: what dropping it takes away from the tokens routed to it.

Sums over the tokens that an expert runs, in one walk over the model. Source of the saliency: REAP,
router-weighted expert activation pruning, arXiv 2510.13999.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.execute.block_runner import calibration_runner
from graphopt.execute.hidden_states import HiddenStateStream
from graphopt.ir.graph import Program, Value
from graphopt.ir.mixture import Mixture
from graphopt.support.progress import Progress, silent

_Observer = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class ExpertActivity:
    """What the experts of one mixture did on a text.

    Attributes:
        tokens: How many tokens ran each, int64 [experts].
        norms: Sum of the norms of its outputs over these, fp64 [experts].
        weighted_norms: The same with outputs times their gates.
    """

    tokens: Tensor
    norms: Tensor
    weighted_norms: Tensor

    def saliency(self, score: str) -> Tensor:
        """Return how much each expert matters, fp64 [experts]; the lowest goes first.

        Args:
            score: `reap`: the mean over its tokens of the norm of its output times its gate.
                `ean`: the sum over its tokens of the norm of its output (expert activation norm).
                `frequency`: the share of all tokens that run it.
        """
        if score == "reap":
            return self.weighted_norms / self.tokens.clamp(min=1)
        if score == "ean":
            return self.norms
        return self.tokens.double() / self.tokens.sum().clamp(min=1)


def measure_experts(
    program: Program,
    mixtures: Mapping[int, Mixture],
    windows: Tensor,
    device: torch.device,
    progress: Progress = silent,
) -> dict[int, ExpertActivity]:
    """Return what experts did on windows of text, by the index of their block.

    Args:
        mixtures: By the index of their block among `find_blocks`.
        windows: int64 [N, S], without padding.

    Raises:
        SourceError: A weight cannot be read.
    """
    runner = calibration_runner(program, device)
    stream = HiddenStateStream(runner, windows, progress=progress, what="scoring experts")
    found: dict[int, ExpertActivity] = {}
    for block in stream:
        mixture = mixtures.get(block.index)
        if mixture is None:
            continue
        sums = _Sums(mixture, device)
        block.advance(observers=sums.observers())
        found[block.index] = sums.activity()
    return found


class _Sums:
    """Sums over the rows of a mixture, batch by batch."""

    def __init__(self, mixture: Mixture, device: torch.device) -> None:
        self.mixture = mixture
        self.tokens = torch.zeros(mixture.experts, dtype=torch.int64, device=device)
        self.sums = {
            value: torch.zeros(mixture.experts, dtype=torch.float64, device=device)
            for value in (mixture.outputs, mixture.weighted)
        }
        self.experts = torch.zeros(0, dtype=torch.int64)

    def observers(self) -> dict[Value, _Observer]:
        return {
            self.mixture.expert_of_row: self._start,
            **{value: self._adder(value) for value in self.sums},
        }

    def activity(self) -> ExpertActivity:
        sums = [self.sums[value].cpu() for value in (self.mixture.outputs, self.mixture.weighted)]
        return ExpertActivity(self.tokens.cpu(), *sums)

    def _start(self, batch: int, experts_R: Tensor) -> None:
        self.experts = experts_R
        self.tokens += torch.bincount(experts_R, minlength=self.mixture.experts)

    def _adder(self, value: Value) -> _Observer:
        def add(batch: int, rows_RD: Tensor) -> None:
            norms = torch.linalg.vector_norm(rows_RD.float(), dim=-1).double()
            self.sums[value].index_add_(0, self.experts, norms)

        return add
