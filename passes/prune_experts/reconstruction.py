"""Solving for the down projections of experts that are left: they make up for those that went."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from graphopt.calibration.reconstruction import Reconstruction, held_out_windows
from graphopt.calibration.token_power import token_power
from graphopt.execute.block_runner import calibration_runner
from graphopt.execute.hidden_states import BlockStep, HiddenStateStream
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Program, Value
from graphopt.ir.mixture import Mixture, find_mixtures, put_producer, stack_of
from graphopt.ir.weights import Array, SharedSources
from graphopt.solvers.least_squares import LeastSquares, best_ridge
from graphopt.support.progress import Progress, silent


def reconstruct_experts(
    program: Program,
    pruned: Program,
    blocks: Collection[int],
    windows: Tensor,
    device: torch.device,
    progress: Progress,
) -> list[Reconstruction]:
    """Solve for the down projections of experts that are left, in place.

    A mixture's output is to be what the whole mixture gives on the same tokens, which in the
    pruned model are those that the blocks before it make. Expert by expert the change of the
    projection is solved for by least squares with L2 regularisation towards the weights as they
    are, on the tokens that the expert runs, for what the experts before it have left over. The
    strength is the one that is best on held-out windows; where none is better than no change, the
    expert stays as it is. Tokens count in units of the residual stream's power.

    Args:
        program: The model before, whose mixtures are whole.
        pruned: The same with fewer experts, whose weights are replaced.
        blocks: The indices of the blocks that lost experts.
        windows: int64 [N, S], of which the last ones are held out.

    Returns:
        For each of these blocks the outcome.
    """
    held = held_out_windows(len(windows)) if len(windows) > 1 else 0
    if not held:
        return []
    sources = SharedSources()
    student = _stream(pruned, windows, held, device, sources, progress)
    teacher = _stream(program, windows, held, device, sources, silent)
    whole, left = _mixtures(program), _mixtures(pruned)
    outcomes: list[Reconstruction] = []
    for block in student:
        sources.forget()
        if block.index not in blocks:
            continue
        teacher.skip_to(block.index, block.hidden)
        solving = _Solving(block, left[block.index], teacher.current(), whole[block.index])
        outcomes.append(solving.solve())
        call = pruned.calls[block.block.position]
        stack = solving.stack.contiguous().cpu()
        dtype = pruned.weights[call.weights[solving.slot]].dtype
        put_producer(pruned, call, solving.slot, Array(stack.to(dtype)))
        block.replace().advance()
    return outcomes


def _stream(
    program: Program,
    windows: Tensor,
    held: int,
    device: torch.device,
    sources: SharedSources,
    progress: Progress,
) -> HiddenStateStream:
    return HiddenStateStream(
        calibration_runner(program, device, sources), windows, held_out=held, progress=progress,
        what="reconstructing",
    )  # fmt: skip


def _mixtures(program: Program) -> dict[int, Mixture]:
    places = {block.position: index for index, block in enumerate(find_blocks(program))}
    return {
        places[block.position]: mixture
        for block, mixture in find_mixtures(program)
        if isinstance(mixture, Mixture)
    }


class _Solving:
    """The experts of one mixture, and what they lack.

    Attributes:
        slot, stack: The slot of their down projections, and its value as it becomes.
    """

    def __init__(
        self, block: BlockStep, mixture: Mixture, dense: BlockStep, whole: Mixture
    ) -> None:
        self.block, self.mixture = block, mixture
        self.slot, self.transposed = stack_of(block.function, mixture.last)
        self.stack = block.weights[self.slot].float().clone()
        self.held_out, self.ranks = block.stream.held_out, block.stream.ranks
        self.power = 0.0
        self.rows: list[Mapping[str, Tensor]] = []
        self.lacking: list[Tensor] = []
        for batch in range(len(block.hidden)):
            wanted = [whole.token_of_row, whole.weighted, dense.function.results[0]]
            token_R, weighted, behind = dense.values(batch, wanted)
            root_T1 = token_power(behind).flatten(0, -2).sqrt()
            lacking = weighted.new_zeros(len(root_T1), weighted.shape[1], dtype=torch.float32)
            lacking.index_add_(0, token_R, weighted.float())
            if self.held_out[batch]:
                self.power += float((lacking / root_T1).square().sum())
            self._take(batch, lacking, root_T1)

    def _take(self, batch: int, lacking: Tensor, root_T1: Tensor) -> None:
        """Keep a batch's rows, and what their experts lack of the whole mixture's output."""
        mixture = self.mixture
        wanted: list[Value] = [
            mixture.expert_of_row, mixture.token_of_row, mixture.hidden, mixture.gates,
            mixture.weighted,
        ]  # fmt: skip
        owner, token_R, hidden, gates, weighted = self.block.values(batch, wanted)
        lacking.index_add_(0, token_R, weighted.float(), alpha=-1)
        features = hidden.float() * gates.float() / root_T1[token_R]
        self.rows.append({"owner": owner, "token": token_R, "features": features})
        self.lacking.append(lacking / root_T1)

    def _error(self) -> float:
        pairs = zip(self.lacking, self.held_out, strict=True)
        own = sum(float(lacking.square().sum()) for lacking, held in pairs if held)
        return self.ranks.totals(own)[0]

    def solve(self) -> Reconstruction:
        """Solve for one expert after another."""
        before = self._error()
        for expert in range(self.mixture.experts):
            learn, held_out = LeastSquares(), LeastSquares()
            parts: list[tuple[Tensor, Tensor]] = []
            for rows, lacking, held in zip(self.rows, self.lacking, self.held_out, strict=True):
                own = rows["owner"] == expert
                token, features = rows["token"][own], rows["features"][own]
                parts.append((token, features))
                (held_out if held else learn).add(features, lacking[token])
            for sums in (learn, held_out):
                sums.reduce(self.ranks)
            if not learn.count or not held_out.count:
                continue
            ridge, _ = best_ridge(learn, held_out)
            if ridge is None:
                continue
            change = (learn + held_out).solve(ridge).float()
            for (token, features), lacking in zip(parts, self.lacking, strict=True):
                lacking.index_add_(0, token, features @ change, alpha=-1)
            self.stack[expert] += change.t() if self.transposed else change
        where = f"{self.block.name}: experts"
        power = max(self.ranks.totals(self.power)[0], 1e-30)
        return Reconstruction(where, before / power, self._error() / power, None)
