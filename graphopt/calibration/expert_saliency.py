"""How much each expert of a mixture adds: what dropping it takes away from the tokens routed to it.

Sums over the tokens that an expert runs, in one walk over the model. Source of the saliency: REAP,
router-weighted expert activation pruning, arXiv 2510.13999.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.calibration.token_power import token_power
from graphopt.execute.block_runner import calibration_runner
from graphopt.execute.hidden_states import BlockStep, HiddenStateStream
from graphopt.ir.graph import Program, Value
from graphopt.ir.mixture import Mixture
from graphopt.support.progress import Progress, silent

_Observer = Callable[[int, Tensor], None]


SCORES = {
    "reap": "mean over an expert's tokens of the norm of its output times its gate (REAP)",
    "energy": "sum over its tokens of that norm's square, in units of the stream's power",
    "ean": "sum over its tokens of the norm of its output (expert activation norm)",
    "frequency": "share of the tokens' choices that are it",
}
"""What a score is; the lowest goes first. All are 0 for an expert that no token runs.

An expert that goes takes away what it adds in the tokens that run it, so that an error summed over
text is the energy; the mean says how much one of its tokens loses, however few they are.
"""


@dataclass(frozen=True)
class ExpertActivity:
    """What the experts of one mixture did on a text.

    Attributes:
        tokens: How many tokens ran each, int64 [experts].
        norms: Sum of the norms of its outputs over these, fp64 [experts].
        weighted_norms: The same with outputs times their gates.
        energies: The sum of these norms' squares, each in units of the power of the residual stream
            behind the block.
    """

    tokens: Tensor
    norms: Tensor
    weighted_norms: Tensor
    energies: Tensor

    def saliency(self, score: str) -> Tensor:
        """Return how much each expert matters by one of `SCORES`, fp64 [experts]."""
        if score == "reap":
            return self.weighted_norms / self.tokens.clamp(min=1)
        if score == "energy":
            return self.energies / self.energies.sum().clamp(min=1e-30)
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
        sums = _Sums(block, mixture)
        block.advance(observers=sums.observers())
        found[block.index] = sums.activity()
    return found


class _Sums:
    """Sums over the rows of a mixture, batch by batch, and over ranks."""

    def __init__(self, block: BlockStep, mixture: Mixture) -> None:
        self.mixture, self.behind = mixture, block.function.results[0]
        self.ranks = block.stream.ranks
        self.sums = torch.zeros(4, mixture.experts, dtype=torch.float64, device=block.stream.device)
        self.values: dict[Value, Tensor] = {}

    def observers(self) -> dict[Value, _Observer]:
        """Return what is called with the values that are summed, of which the stream is last."""
        mixture = self.mixture
        rows = (mixture.expert_of_row, mixture.token_of_row, mixture.outputs, mixture.weighted)
        return {**{value: self._keeper(value) for value in rows}, self.behind: self._add}

    def activity(self) -> ExpertActivity:
        tokens, *sums = self.ranks.total(self.sums).cpu()
        return ExpertActivity(tokens.long(), *sums)

    def _keeper(self, value: Value) -> _Observer:
        def keep(batch: int, tensor: Tensor) -> None:
            if tensor.is_floating_point():
                # Of rows their norms are all that is needed.
                tensor = torch.linalg.vector_norm(tensor.float(), dim=-1)
            self.values[value] = tensor

        return keep

    def _add(self, batch: int, behind: Tensor) -> None:
        mixture, values = self.mixture, self.values
        owner_R, token_R = values[mixture.expert_of_row], values[mixture.token_of_row]
        norms, weighted = values[mixture.outputs].double(), values[mixture.weighted].double()
        power_T = token_power(behind).flatten().double()
        rows = [torch.ones_like(norms), norms, weighted, weighted.square() / power_T[token_R]]
        self.sums.index_add_(1, owner_R, torch.stack(rows))
