"""Closed-form repair: projections into the stream are refitted so that it follows another model's.

Walks the blocks of a shortened program beside those of the dense one. Where a term is added to
the stream by a linear projection, the projection's weight is solved for anew, by least squares,
so that the sum is nearest to what the dense model has in that place; in front of a cut, to what
it has behind the removed blocks. No gradient is needed, and one block of each model is in memory
at a time.

Source: a generalisation of ReplaceMe (Shopkhoev et al., arXiv 2505.02819, section 2), which fits
one linear map behind the cut and folds it into the projection in front of it. Here the whole
projection is solved for, in front of the cut and behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.execute.student import Student
from graphopt.ir.blocks import Block, block_name, find_blocks, sub_blocks
from graphopt.ir.graph import Call, Function, Node, Program, Value
from graphopt.ir.weights import Array
from graphopt.solvers.least_squares import LeastSquares, best_ridge
from graphopt.support.progress import Progress, silent

TOKENS_AT_ONCE = 8192

HELD_OUT = 0.2
"""Of the windows, by which the strength is chosen."""


@dataclass(frozen=True)
class Refit:
    """What became of one projection.

    Attributes:
        where: The block and its part.
        before, after: Relative squared error of the stream on held-out windows.
        ridge: The strength that was best; None where the weight was left as it was.
    """

    where: str
    before: float
    after: float
    ridge: float | None


def repair(
    program: Program,
    dense: Program,
    windows: Tensor,
    *,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> tuple[list[Refit], list[tuple[str, str]]]:
    """Refit the projections of a shortened program, in place, from the first cut on.

    Args:
        program: Its blocks are blocks of `dense`, by their module paths; its weights are replaced.
        windows: int64 [N, S], N at least 2; a fifth of them chooses the strength.

    Returns:
        What became of each projection, and what could not be refitted, with the reason.
    """
    return _Repair(program, dense, windows, device or torch.device("cpu"), progress).run()


class _Repair:
    def __init__(
        self,
        program: Program,
        dense: Program,
        windows: Tensor,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.program, self.dense, self.device = program, dense, device
        self.progress = progress
        blocks, dense_blocks = find_blocks(program), find_blocks(dense)
        self.students = {block_name(program, block): block for block in blocks}
        self.blocks = dense_blocks
        self.ours = Student(
            program, blocks[0].position, blocks[-1].position + 1, {}, device, keep_weights=False
        )
        self.theirs = Student(
            dense, dense_blocks[0].position, dense_blocks[-1].position + 1, {}, device,
            keep_weights=False,
        )  # fmt: skip
        held = max(1, round(len(windows) * HELD_OUT))
        rows = max(1, TOKENS_AT_ONCE // windows.shape[1])
        parts = [(part, False) for part in windows[:-held].split(rows)]
        parts += [(part, True) for part in windows[-held:].split(rows)]
        self.held_out = [held for _, held in parts]
        self.ids = [part.to(device) for part, _ in parts]
        used = [name for call in program.calls for name in set(call.weights.values())]
        self.shared = {name for name in used if used.count(name) > 1}

    def run(self) -> tuple[list[Refit], list[tuple[str, str]]]:
        refits: list[Refit] = []
        skips: list[tuple[str, str]] = []
        with torch.no_grad():
            dense = [self.theirs.inputs(ids) for ids in self.ids]
            for values in dense:
                self.theirs.run(values, 0, self.theirs.first)
            ours: list[dict[str, Any]] | None = None
            number = 0
            while number < len(self.blocks):
                self.progress("refitting projections", number, len(self.blocks))
                block = self.blocks[number]
                twin = self.students.get(block_name(self.dense, block))
                # Behind this block up to here, the shortened program has nothing.
                cut = number + 1 if twin is not None else number
                while cut < len(self.blocks) and self._is_gone(cut):
                    cut += 1
                if ours is None and (twin is None or cut > number + 1):
                    # So far the two models were one.
                    stream = self.dense.calls[block.position].args[block.stream]
                    ours = [{**values, "": values[stream]} for values in dense]
                if twin is None or ours is None:
                    self._run_theirs(number, max(cut, number + 1), dense)
                else:
                    targets = self._targets(block, dense)
                    self._run_theirs(number + 1, cut, dense)
                    if cut > number + 1:
                        behind = self.dense.calls[self.blocks[cut - 1].position].results[0]
                        for target, values in zip(targets, dense, strict=True):
                            target[-1:] = [values[behind]] if target else []
                    found, left = self._refit(twin, ours, targets)
                    refits += found
                    skips += left
                number = max(cut, number + 1)
            self.progress("refitting projections", len(self.blocks), len(self.blocks))
        return refits, skips

    def _is_gone(self, number: int) -> bool:
        return block_name(self.dense, self.blocks[number]) not in self.students

    def _run_theirs(self, first: int, stop: int, dense: list[dict[str, Any]]) -> None:
        for block in self.blocks[first:stop]:
            for values in dense:
                self.theirs.run(values, block.position, block.position + 1)

    def _run_ours(self, block: Block, values: dict[str, Any], **options: Any) -> None:
        """Run a block of the shortened program over its stream, which is called "" here."""
        call = self.program.calls[block.position]
        scope = {**values, call.args[block.stream]: values[""]}
        self.ours.run(scope, block.position, block.position + 1, **options)
        values[""] = scope[call.results[0]]

    def _targets(self, block: Block, dense: list[dict[str, Any]]) -> list[list[Tensor]]:
        """Run a block of the dense program; return its stream behind each of its terms."""
        call = self.dense.calls[block.position]
        parts = sub_blocks(self.dense.functions[call.function], block.stream)
        points = [part.behind for part in parts]
        found: list[list[Tensor]] = []
        for values in dense:
            seen: dict[Value, Tensor] = {}

            def watch(value: Value, tensor: Tensor, seen: dict[Value, Tensor] = seen) -> None:
                if value in points:
                    seen[value] = tensor

            self.theirs.run(values, block.position, block.position + 1, watch)
            found.append([seen[point] for point in points])
        return found

    def _refit(
        self, block: Block, ours: list[dict[str, Any]], targets: list[list[Tensor]]
    ) -> tuple[list[Refit], list[tuple[str, str]]]:
        call = self.program.calls[block.position]
        function = self.program.functions[call.function]
        parts = sub_blocks(function, block.stream)
        refits: list[Refit] = []
        skips: list[tuple[str, str]] = []
        if not parts or len(parts) != len(targets[0]):
            skips.append((block_name(self.program, block), "it is no plain sum of terms"))
            parts = []
        behind = False  # whether the streams are those behind the block already
        for number, part in enumerate(parts):
            where = f"{block_name(self.program, block)}: {part.kind}"
            node = part.term.node
            reason = self._reason(function, call, node)
            if reason or node is None:
                skips.append((where, reason or "it is an input"))
                continue
            last = number == len(parts) - 1
            sums = [LeastSquares(), LeastSquares()]
            kept: list[tuple[Tensor, Tensor]] = []
            for values, target, held in zip(ours, targets, self.held_out, strict=True):
                features, point = self._watched(block, values, node, part.behind)
                # Every token counts in units of its target's square, as in `relative_mse`.
                square = target[number].float().square().sum(-1, keepdim=True)
                root = square.clamp(min=1e-12).rsqrt()
                residual = target[number].float() - point.float()
                sums[held].add(features.float() * root, residual * root)
                if last:
                    kept.append((features, point))
            refit, change = self._solve(where, function, call, node, sums)
            refits.append(refit)
            behind = last
            for values, (features, point) in zip(ours, kept, strict=True) if last else ():
                # What another run of the block would give.
                moved = 0.0 if change is None else features.float() @ change.float()
                values[""] = (point + moved).to(point.dtype)
        if not behind:
            for values in ours:
                self._run_ours(block, values)
        return refits, skips

    def _watched(
        self, block: Block, values: dict[str, Any], projection: Node, behind: Value
    ) -> tuple[Tensor, Tensor]:
        """Run a block; return what a projection of it reads, and the stream behind its addition."""
        wanted = (projection.inputs[0], behind)
        seen: dict[Value, Tensor] = {}

        def watch(value: Value, tensor: Tensor) -> None:
            if value in wanted:
                seen[value] = tensor

        self._run_ours(block, dict(values), watch=watch)
        features, point = wanted
        assert features is not None
        return seen[features], seen[point]

    def _reason(self, function: Function, call: Call, node: Node | None) -> str | None:
        """Return why a term's projection cannot be refitted."""
        if node is None or node.op != "linear":
            return "what is added to the stream is not made by a projection"
        slots = {value: slot for slot, value in function.weights.items()}
        weight, features = node.inputs[1], node.inputs[0]
        if weight not in slots or features is None or features.node is None:
            return "its projection has no weight of its own"
        if call.weights[slots[weight]] in self.shared:
            return "its projection's weight is used in other places too"
        return None

    def _solve(
        self, where: str, function: Function, call: Call, node: Node, sums: list[LeastSquares]
    ) -> tuple[Refit, Tensor | None]:
        """Put the best weight into the program; return what became of it, and the change."""
        slots = {value: slot for slot, value in function.weights.items()}
        assert node.inputs[1] is not None
        name = call.weights[slots[node.inputs[1]]]
        fit, held = sums
        ridge, after = best_ridge(fit, held)
        change = None if ridge is None else fit.solve(ridge)
        if change is not None:
            weight = self.program.weights[name]
            value = weight.load(torch.float32)
            value = value + change.t().to(value)
            self.program.weights.replace(weight.with_producer(Array(value)))
        # Of a token the target's square is 1.
        return Refit(where, held.error(None) / held.count, after / held.count, ridge), change
