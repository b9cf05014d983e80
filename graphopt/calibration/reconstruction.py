"""Least-squares reconstruction: projections into the residual stream are solved for in closed form.

A projection adds to the residual stream features times a weight. What the weight has to change by
so that the stream behind it is nearest to a target, that of another model in the same place, is a
ridge regression: the change is pulled towards 0, that is the weight towards what it is, with the
strength that is best on text that the fit does not see. No gradient is needed.

`carve-moe` reconstructs the down projections of the parts that it carves, and
`reconstruct_behind_cuts` all projections of a model from which blocks were removed.

Source: a generalisation of ReplaceMe (Shopkhoev et al., arXiv 2505.02819, section 2), which fits
one linear map behind the cut and folds it into the projection in front of it. Here the whole
projection is solved for, in front of the cut and behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.calibration.token_power import token_power
from graphopt.execute.block_runner import calibration_runner
from graphopt.execute.hidden_states import BlockStep, HiddenStateStream
from graphopt.ir.blocks import SubBlock, sub_blocks
from graphopt.ir.graph import Program
from graphopt.ir.weights import Array
from graphopt.solvers.least_squares import LeastSquares, best_ridge
from graphopt.support.progress import Progress, silent

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
        ridge: The strength that was best; None where the weight was left as it was.
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
) -> tuple[Reconstruction, list[Tensor]]:
    """Solve for a projection into the residual stream, and put its weight into the program.

    Args:
        program: Its weights are replaced, each in its own dtype.
        where: What the projection is called in the report.
        weights: The names of the weights [D, n] that make up the projection, each with the
            columns that it has of all N features; nothing else may read them.
        batches: For each batch the projection's features [..., N] and the residual stream behind
            the addition, [..., D]. They are iterated twice.
        targets: For each batch the residual stream as it should be, [..., D].
        held_out: For each batch whether the strength is chosen by it.

    Returns:
        The outcome, and for each batch the residual stream behind the addition as it is now, on
        the device of its target.
    """
    learn, held = LeastSquares(), LeastSquares()
    for (features, behind), target, is_held in zip(batches, targets, held_out, strict=True):
        goal = target.to(behind.device).float()
        # Every token counts in units of its target's power.
        root = token_power(goal).rsqrt()
        residual = ((goal - behind.float()) * root).flatten(0, -2)
        scaled = features.float().flatten(0, -2) * root.flatten(0, -2)
        (held if is_held else learn).add(scaled, residual)
    ridge, after = best_ridge(learn, held)
    # The target's power is 1 for every token, so that sums over tokens are relative.
    outcome = Reconstruction(where, held.error(None) / held.count, after / held.count, ridge)
    change = None if ridge is None else (learn + held).solve(ridge).float()
    moved: list[Tensor] = []
    for (features, behind), target in zip(batches, targets, strict=True):
        states = behind.float()
        if change is not None:
            states = states + (features.float().flatten(0, -2) @ change).view_as(states)
        moved.append(states.to(behind.dtype).to(target.device))
    if change is not None:
        for name, columns in weights.items():
            weight = program.weights[name]
            value = weight.load(torch.float32)
            value = (value + change[columns].t().to(value)).to(weight.dtype).contiguous()
            program.weights.replace(weight.with_producer(Array(value)))
    return outcome, moved


def reconstruct_behind_cuts(
    program: Program,
    dense: Program,
    windows: Tensor,
    *,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> tuple[list[Reconstruction], list[tuple[str, str]]]:
    """Reconstruct the projections of a shortened program, in place, from the first cut on.

    The target of a projection is the dense program's residual stream in the same place; of the
    last one in front of a cut, the one behind the removed blocks.

    Args:
        program: Its blocks are blocks of `dense`, by their module paths; its weights are replaced.
        windows: int64 [N, S], N at least 2; `held_out_windows` of them choose the strength.

    Returns:
        The outcome for each projection, and what could not be reconstructed, with the reason.
    """
    held_out = held_out_windows(len(windows))
    teacher, student = (
        HiddenStateStream(
            calibration_runner(model, device or torch.device("cpu")), windows,
            held_out=held_out, progress=told, what="refitting projections",
        )
        for model, told in ((dense, silent), (program, progress))
    )  # fmt: skip
    left = {student.name_of(index) for index in range(len(student.blocks))}
    gone = [i for i in range(len(teacher.blocks)) if teacher.name_of(i) not in left]
    outcomes: list[Reconstruction] = []
    skipped: list[tuple[str, str]] = []
    if not gone:
        return outcomes, skipped
    # Up to the block in front of the first cut the two models are one.
    first = max(gone[0] - 1, 0)
    teacher.run_to(first)
    student.skip_to(first, teacher.hidden)
    for block in student:
        while teacher.name_of(teacher.index) != block.name:
            teacher.current().advance()
        targets = _targets(teacher.current())
        while teacher.index in gone:
            teacher.current().advance()
            targets[-1:] = [teacher.hidden] if targets else []
        _reconstruct_block(program, block, targets, outcomes, skipped)
    return outcomes, skipped


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
    targets: list[list[Tensor]],
    outcomes: list[Reconstruction],
    skipped: list[tuple[str, str]],
) -> None:
    """Reconstruct each projection of a block in turn, and move the stream behind the block."""
    parts = sub_blocks(block.function, block.block.stream)
    if not parts or len(parts) != len(targets):
        skipped.append((block.name, "it is no plain sum of terms"))
        return
    for part, target in zip(parts, targets, strict=True):
        where = f"{block.name}: {part.kind}"
        projection = part.term.node
        reason = _why_left(program, block, part)
        if reason or projection is None or projection.inputs[0] is None:
            skipped.append((where, reason or "it is an input"))
            continue
        slots = {value: slot for slot, value in block.function.weights.items()}
        name = block.call.weights[slots[projection.inputs[1]]]  # type: ignore[index]
        batches = block.values_per_batch([projection.inputs[0], part.behind])
        outcome, states = reconstruct(
            program,
            where,
            {name: slice(None)},
            batches.map(lambda values: (values[0], values[1])),
            target,
            block.stream.held_out,
        )
        outcomes.append(outcome)
        block.keep(part.behind, states)
    behind = block.function.results[0]
    values = block.values_per_batch([behind])
    block.advance([block.stream.offload(states) for (states,) in values])


def _why_left(program: Program, block: BlockStep, part: SubBlock) -> str | None:
    """Return why a term's projection cannot be reconstructed."""
    node = part.term.node
    if node is None or node.op != "linear":
        return "what is added to the stream is not made by a projection"
    slots = {value: slot for slot, value in block.function.weights.items()}
    weight, features = node.inputs[1], node.inputs[0]
    if weight not in slots or features is None or features.node is None:
        return "its projection has no weight of its own"
    name = block.call.weights[slots[weight]]
    if sum(name in call.weights.values() for call in program.calls) > 1:
        return "its projection's weight is used in other places too"
    return None
