"""Least-squares reconstruction: projections into the residual stream are solved for in closed form.

A projection adds to the residual stream features times a weight. What the weight has to change by
so that the stream behind it is nearest to a target, that of another model in the same place, is a
ridge regression: the change is pulled towards 0, that is the weight towards what it is, with the
strength that is best on text that the fit does not see. No gradient is needed.

`carve-moe` reconstructs the down projections of the parts that it carves, and
`reconstruct_behind_cuts` all projections of a model from which blocks were removed.

Terms that are added beside each other, as in GPT-NeoX, are solved for as one projection; a norm
between a projection and the stream, as in Gemma 2 and 3, is in `graphopt.calibration.behind_norm`.

Source: a generalisation of ReplaceMe (Shopkhoev et al., arXiv 2505.02819, section 2), which fits
one linear map behind the cut and folds it into the projection in front of it. Here the whole
projection is solved for, in front of the cut and behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from graphopt.calibration.behind_norm import fit_behind_norm
from graphopt.calibration.output_path import OutputNorm, OutputPath, own_weight
from graphopt.calibration.time_for_fits import TimeForFits
from graphopt.calibration.token_power import token_power
from graphopt.execute.block_runner import calibration_runner
from graphopt.execute.hidden_states import BlockStep, HiddenStateStream
from graphopt.ir.blocks import SubBlock, sub_blocks
from graphopt.ir.graph import Program, Value
from graphopt.ir.weights import Array
from graphopt.solvers.least_squares import LeastSquares, best_ridge
from graphopt.support.progress import Progress, silent
from graphopt.support.ranks import ALONE, Ranks

HELD_OUT_SHARE = 0.25
"""Share of the calibration windows that no fit learns from: strengths are chosen by them, and
figures of the report measured on them."""


def held_out_windows(count: int) -> int:
    """Return how many of `count` windows, the last ones, are held out; one at least."""
    return max(1, round(HELD_OUT_SHARE * count))


@dataclass(frozen=True)
class Reconstruction:
    """The outcome for one projection.

    Attributes:
        where: The block and its part.
        before, after: Relative squared error of the residual stream on held-out windows.
        ridge: The strength that was best; None where the weight was left as it was, though the gain
            of a norm behind it may have changed.
    """

    where: str
    before: float
    after: float
    ridge: float | None


def reconstruct(
    program: Program,
    where: str,
    weights: Mapping[str, slice],
    batches: Sequence[tuple[Tensor, Tensor]],
    targets: Sequence[Tensor],
    held_out: Sequence[bool],
    norm: OutputNorm | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Reconstruction, list[Tensor]]:
    """Solve for a projection into the residual stream, and put its weight into the program.

    Args:
        program: Its weights are replaced, each in its own dtype.
        where: What the projection is called in the report.
        weights: The names of the weights that make up the projection, each with the features that
            it has of all N: matrices [D, n], and a bias [D] that has one feature of ones. Nothing
            else may read them.
        batches: For each batch the projection's features [..., N] and the residual stream behind
            the addition, [..., D]. They are iterated twice, and several times with a norm.
        targets: For each batch the residual stream as it should be, [..., D].
        held_out: For each batch whether the strength is chosen by it.
        norm: What the projection's output goes through, if it does.
        ranks: Who shares the tokens.

    Returns:
        The outcome, and for each batch the residual stream behind the addition as it is now, on
        the device of its target.
    """
    if norm is not None:
        return _reconstruct_behind_norm(
            program, where, weights, batches, targets, held_out, norm, ranks
        )
    learn, held = LeastSquares(), LeastSquares()
    for (features, states), target, is_held in zip(batches, targets, held_out, strict=True):
        goal = target.to(states.device).float()
        # Every token counts in units of its target's power.
        root = token_power(goal).rsqrt()
        residual = ((goal - states.float()) * root).flatten(0, -2)
        scaled = features.float().flatten(0, -2) * root.flatten(0, -2)
        (held if is_held else learn).add(scaled, residual)
    for sums in (learn, held):
        sums.reduce(ranks)
    ridge, after = best_ridge(learn, held)
    # The target's power is 1 for every token, so that sums over tokens are relative.
    outcome = Reconstruction(where, held.error(None) / held.count, after / held.count, ridge)
    change = None if ridge is None else (learn + held).solve(ridge).float()
    moved: list[Tensor] = []
    for (features, given), target in zip(batches, targets, strict=True):
        states = given.float()
        if change is not None:
            states = states + (features.float().flatten(0, -2) @ change).view_as(states)
        moved.append(states.to(given.dtype).to(target.device))
    if change is not None:
        _add(program, weights, change.t())
    return outcome, moved


def _reconstruct_behind_norm(
    program: Program,
    where: str,
    weights: Mapping[str, slice],
    batches: Sequence[tuple[Tensor, Tensor]],
    targets: Sequence[Tensor],
    held_out: Sequence[bool],
    norm: OutputNorm,
    ranks: Ranks,
) -> tuple[Reconstruction, list[Tensor]]:
    features, states = batches[0]
    matrix = torch.zeros(states.shape[-1], features.shape[-1], device=states.device)
    for name, columns in weights.items():
        value = program.weights[name].load(torch.float32).to(matrix)
        matrix[:, columns] = value if value.dim() == 2 else value[:, None]
    del features, states
    fit = fit_behind_norm(matrix, norm, batches, targets, held_out, ranks)
    outcome = Reconstruction(where, fit.before, fit.after, fit.ridge)
    moved: list[Tensor] = []
    for (features, given), target in zip(batches, targets, strict=True):
        rows = features.float()
        added = fit.norm(rows @ fit.matrix.t()) - norm(rows @ matrix.t())
        moved.append((given.float() + added.view_as(given)).to(given.dtype).to(target.device))
    if fit.matrix is not matrix:
        _add(program, weights, fit.matrix - matrix)
    if fit.norm is not norm and norm.gain_weight is not None:
        gain = program.weights[norm.gain_weight]
        assert fit.norm.gain is not None
        value = (fit.norm.gain - norm.offset).to(gain.load())
        program.weights.replace(gain.with_producer(Array(value)))
    return outcome, moved


def _add(program: Program, weights: Mapping[str, slice], change: Tensor) -> None:
    """Add to the weights of a projection, each in its own dtype.

    Args:
        change: What is added to the whole projection, [D, N].
    """
    for name, columns in weights.items():
        weight = program.weights[name]
        value = weight.load(torch.float32)
        added = change[:, columns].to(value)
        value = value + (added if value.dim() == 2 else added[:, 0])
        program.weights.replace(weight.with_producer(Array(value.to(weight.dtype).contiguous())))


def reconstruct_behind_cuts(
    program: Program,
    dense: Program,
    windows: Tensor,
    *,
    cuts_only: bool = False,
    device: torch.device | None = None,
    until: float | None = None,
    progress: Progress = silent,
) -> tuple[list[Reconstruction], list[tuple[str, str]]]:
    """Reconstruct the projections of a shortened program, in place, from the first cut on.

    The target of a projection is the dense program's residual stream in the same place; of the
    last one in front of a cut, the one behind the removed blocks. That one has the most to gain:
    it alone is to do what others did.

    Args:
        program: Its blocks are blocks of `dense`, by their module paths; its weights are replaced.
        windows: int64 [N, S], N at least 2; `held_out_windows` of them choose the strength.
        cuts_only: Solve for no others than the last ones in front of cuts.
        until: When the time is over, on the ranks' clock. No fit is begun that would take longer,
            judging by those before it.

    Returns:
        The outcome for each projection, and what was not reconstructed, with the reason.
    """
    held_out = held_out_windows(len(windows))
    teacher, student = (
        HiddenStateStream(
            calibration_runner(model, device or torch.device("cpu")), windows,
            held_out=held_out, progress=told, what="reconstructing projections",
        )
        for model, told in ((dense, silent), (program, progress))
    )  # fmt: skip
    left = {student.name_of(index) for index in range(len(student.blocks))}
    gone = [i for i in range(len(teacher.blocks)) if teacher.name_of(i) not in left]
    outcomes: list[Reconstruction] = []
    skipped: list[tuple[str, str]] = []
    if not gone:
        return outcomes, skipped
    in_front = [i for i in range(len(teacher.blocks)) if i not in gone and i + 1 in gone]
    if gone[0] == 0:  # no block is in front of the first cut
        in_front.insert(0, teacher.index_of(student.name_of(0)))
    # Up to the block in front of the first cut the two models are one.
    first = max(gone[0] - 1, 0)
    time = TimeForFits(until, windows.numel() // student.ranks.world)
    teacher.run_to(first)
    student.skip_to(first, teacher.hidden)
    for block in student:
        index = teacher.index_of(block.name)
        if cuts_only and index > in_front[-1]:
            break
        if reason := time.lacking():
            skipped.append((f"{block.name} and what is behind it", reason))
            break
        began, from_block = time.now(), teacher.index
        teacher.run_to(index)
        if cuts_only and index not in in_front:
            continue
        targets = _targets(teacher.current())
        # Terms that end the block are several where they are added beside each other.
        ends = [target is targets[-1] for target in targets]
        while teacher.index in gone:
            teacher.current().advance()
        time.ran(time.of_run((teacher.index - from_block) * _weights(block)), began)
        aims = [
            teacher.hidden if last else None if cuts_only else target
            for target, last in zip(targets, ends, strict=True)
        ]
        if not _reconstruct_block(program, block, aims, outcomes, skipped, time):
            break
    return outcomes, skipped


def _weights(block: BlockStep) -> int:
    program = block.stream.program
    return sum(program.weights[name].numel for name in block.call.weights.values())


def _targets(block: BlockStep) -> list[list[Tensor]]:
    """Move a teacher behind a block; return its hidden states behind each term of the block."""
    points = [part.behind for part in sub_blocks(block.function, block.block.stream)]
    seen: dict[int, list[Tensor]] = {number: [] for number in range(len(points))}

    def keep(batch: int, tensor: Tensor, number: int) -> None:
        seen[number].append(block.stream.offload(tensor))

    # Terms that are added beside each other have one place.
    observers = {
        point: lambda batch, tensor, number=number: keep(batch, tensor, number)
        for number, point in enumerate(points)
    }
    block.advance(observers=observers)
    place = {point: number for number, point in enumerate(points)}
    return [seen[place[point]] for point in points]


def _reconstruct_block(
    program: Program,
    block: BlockStep,
    targets: Sequence[list[Tensor] | None],
    outcomes: list[Reconstruction],
    skipped: list[tuple[str, str]],
    time: TimeForFits,
) -> bool:
    """Reconstruct each projection of a block in turn, and move the stream behind the block.

    Args:
        targets: The stream behind each term as it should be; None for one to leave as it is.

    Returns:
        Whether there was time for all of it; if not, the stream stays inside the block.
    """
    parts = sub_blocks(block.function, block.block.stream)
    if not parts or len(parts) != len(targets):
        skipped.append((block.name, "it is no plain sum of terms"))
        return True
    projections: list[tuple[SubBlock, list[Tensor], _Projection]] = []
    for part, target in zip(parts, targets, strict=True):
        if target is None:
            continue
        projection = _projection(program, block, part)
        if isinstance(projection, str):
            skipped.append((f"{block.name}: {part.kind}", projection))
        else:
            projections.append((part, target, projection))

    def solved_together(one: tuple[SubBlock, list[Tensor], _Projection]) -> tuple[Value, ...]:
        part, _, projection = one
        return (part.behind,) if projection.norm is None else (part.behind, part.term)

    for (place, *_), group in groupby(projections, key=solved_together):
        # Terms that are added beside each other are solved for together, as one projection with
        # the features of both; a norm behind one of them stands between it and the others.
        terms = list(group)
        where = f"{block.name}: {' and '.join(part.kind for part, _, _ in terms)}"
        together = [projection for _, _, projection in terms]
        weights: dict[str, slice] = {}
        count = 0
        for projection in together:
            width = program.weights[projection.weight].shape[1]
            weights[projection.weight] = slice(count, count + width)
            count += width
            if projection.bias is not None:
                weights[projection.bias] = slice(count, count + 1)
                count += 1
        operations = time.of_fit(count, program.weights[together[0].weight].shape[0])
        if reason := time.lacking(operations):
            skipped.append((f"{where} and what is behind it", reason))
            return False
        began = time.now()
        values = block.values_per_batch([*(one.features for one in together), place])
        outcome, states = reconstruct(
            program, where, weights, values.map(partial(_joined, together)),
            terms[-1][1], block.stream.held_out, together[0].norm, block.stream.ranks,
        )  # fmt: skip
        outcomes.append(outcome)
        block.keep(place, states)
        time.fitted(operations, began)
    behind = block.function.results[0]
    values = block.values_per_batch([behind])
    block.advance([block.stream.offload(states) for (states,) in values])
    return True


@dataclass(frozen=True)
class _Projection:
    """A projection that can be solved for.

    Attributes:
        features: What it reads.
        weight, bias: Names of weights that nothing else reads.
        factor: What its output is times, in front of a norm if there is one.
    """

    features: Value
    weight: str
    bias: str | None
    factor: float
    norm: OutputNorm | None


def _joined(together: list[_Projection], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the features of some projections as those of one, and the stream behind them."""
    *features, states = values
    columns: list[Tensor] = []
    for tensor, projection in zip(features, together, strict=True):
        factor = projection.factor
        columns.append(tensor if factor == 1 else tensor * factor)
        if projection.bias is not None:
            columns.append(torch.full_like(tensor[..., :1], factor))
    return torch.cat(columns, dim=-1) if len(columns) > 1 else columns[0], states


def _projection(program: Program, block: BlockStep, part: SubBlock) -> _Projection | str:
    """Return a term's projection, or why it cannot be solved for."""
    path = OutputPath.of(block.function, part)
    if isinstance(path, str):
        return path
    features, weight, bias = (path.projection.operand(index) for index in range(3))
    if features is None or features.node is None or weight not in block.function.weights.values():
        return "its output projection is computed, not stored"
    name = own_weight(program, block, weight)
    if name is None:
        return "its projection's weight is used in other places too"
    own_bias = own_weight(program, block, bias)
    return _Projection(
        features, name, own_bias, path.factor(block.call),
        path.output_norm(program, block, with_bias=own_bias is None),
    )  # fmt: skip
