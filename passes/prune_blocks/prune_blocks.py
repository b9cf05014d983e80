"""Depth pruning: the blocks, or parts of blocks, that matter least are taken out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from graphopt.calibration.scores import PruningUnit, units_of
from graphopt.errors import PassError, UsageError
from graphopt.ir.blocks import (
    block_name,
    find_blocks,
    private_results,
    remove_sub_blocks,
)
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context, Forecast, Pass, PassResult, register_pass
from graphopt.pass_manager.outside_blocks import outside_blocks
from graphopt.pass_manager.statements import RemovedParts
from graphopt.passes.prune_blocks.chooser import PARTS, Chooser
from graphopt.passes.prune_blocks.record import PrunedBlocks
from graphopt.report.record import Record
from graphopt.support.devices import must_fit
from graphopt.support.per_device import PerDevice, on_device

SCORED_AGAIN = 0.5
"""The share of the units that are scored again after a removal, about."""


@register_pass
@dataclass
class PruneBlocks(Pass):
    """Take out the blocks that change the results least.

    Give one of `ratio` (a share of the blocks, rounded up), `blocks` (how many) and `remove`
    (which, from 0). What is scored is chosen by `part`: whole blocks, their attentions, their
    feed-forward parts, or either of these two.

    Scores come from `windows` windows of `seqlen` tokens of the calibration text, by default 8
    of 512 on a GPU and 2 of 256 on a CPU, or shorter ones where the model takes fewer tokens;
    see `graphopt.calibration.scores.METRICS`. The default is the divergence of the logits, over the
    tokens that the text makes likely where the vocabulary is large. Where `iterative`, scores are
    taken again after each removal, of the units that may be the lowest. Scores `mi` and `kl`
    compare with the `reference`: the `original` model, or the `current` one, from which what was
    removed before is missing; the others need none. Equal scores go to the lowest index. Blocks
    that are listed are not scored.

    With `look_back` each removed unit is put back and scored again with those that are left, until
    no exchange lowers the score; the best run of neighbours is tried as another beginning, since
    neighbours often cost less together than one by one; and the sets that were lowest are compared
    on more text. It is on
    wherever scores say which set is better: those of results, against the original model.

    Perplexity on held-out windows is watched: where a removal multiplies it by more than 1.5, the
    next three by their scores are tried too, and the one with the lowest goes, with a score of the
    logits only where that is 1.5 times lower. `max_perplexity` ends the removals before the
    model's gets more than so many times what it was.

    Source of macro influence and of the loop: FuseGPT, arXiv 2411.14507, equation 1 and
    algorithm 1, where the reference is the current model.

    Legality:

    1. The program has at least two blocks: calls that take a stream and give it back in the
       same type.
    2. A block's result is read by the next call alone, so that leaving it out changes what one
       call reads.
    3. Parts of blocks are terms added to the stream; a block that is no such sum has none.
    4. At least one block is left.

    Options:
        ratio: The share of the blocks to take out, rounded up.
        blocks: How many blocks to take out.
        remove: Which blocks to take out, by number; nothing is scored.
        part: What is taken out: whole blocks, their attentions, their feed-forward parts (ffn), or
            either of these two (any).
        score: How blocks are compared: by the divergence of the logits (kl), macro influence (mi),
            perplexity (ppl), block influence (bi), or the angle between a block's input and output
            (angular).
        iterative: Whether scores are taken again after each removal.
        look_back: Whether removed blocks are exchanged for others while that lowers the score; by
            default where a score tells which set is better.
        max_perplexity: End before held-out perplexity is more than so many times the whole model's.
        reference: What kl and mi compare with: the original model, or the current one, without what
            was removed before.
        windows: How many windows of the calibration text are scored.
        seqlen: Tokens of a window.
    """

    name: ClassVar[str] = "prune-blocks"
    record: ClassVar[type[Record]] = PrunedBlocks
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    blocks: Annotated[int, Field(ge=1)] | None = None
    remove: list[Annotated[int, Field(ge=0)]] = field(default_factory=list)
    part: Literal["block", "attention", "ffn", "any"] = "block"
    score: Literal["kl", "mi", "ppl", "bi", "angular"] = "kl"
    iterative: bool = True
    look_back: bool | None = None
    max_perplexity: Annotated[float, Field(gt=1)] | None = None
    reference: Literal["original", "current"] = "original"
    windows: Annotated[int, Field(ge=1)] | PerDevice[int] = PerDevice(cpu=2, gpu=8)
    seqlen: Annotated[int, Field(ge=2)] | PerDevice[int] = PerDevice(cpu=256, gpu=512)

    def check_options(self) -> None:
        given = [self.ratio is not None, self.blocks is not None, bool(self.remove)]
        if sum(given) != 1:
            raise UsageError(
                "prune-blocks takes one of ratio, blocks and remove, and was given "
                f"{sum(given) or 'none'}.",
                "Write prune-blocks{ratio=0.25}, or blocks=8, or remove=[20,21].",
            )
        if self.remove and (self.look_back or self.max_perplexity is not None):
            raise UsageError(
                "remove=[...] says what goes, and look_back and max_perplexity choose it.",
                "Leave them out, or give ratio or blocks in the place of remove.",
            )
        if self.look_back and not self.scores_sets:
            raise UsageError(
                f"look_back compares whole sets of removals, which score={self.score} with "
                f"reference={self.reference} does not.",
                "Take score=kl, ppl or mi with reference=original.",
            )
        if len(set(self.remove)) != len(self.remove):
            raise UsageError("remove=[...] names a block twice.", "Name each once.")
        if self.remove and self.part == "any":
            raise UsageError(
                "remove=[...] with part=any does not say which parts.",
                "Give part=attention, part=ffn or part=block.",
            )

    @property
    def scores_sets(self) -> bool:
        """Whether scores say which of two sets is better: those of results, not of changes."""
        return self.score == "ppl" or (self.score in ("mi", "kl") and self.reference == "original")

    @property
    def looks_back(self) -> bool:
        """Whether removed units are put back and tried again."""
        if self.look_back is not None:
            return self.look_back
        return self.scores_sets and self.iterative and not self.remove

    def check(self, program: Program) -> None:
        blocks = find_blocks(program)
        if len(blocks) < 2:
            raise PassError(
                f"Pruning in depth needs a stack of two blocks or more, and {program.name} has "
                f"{len(blocks)}.",
                "Leave prune-blocks out of the recipe.",
            )
        reason = private_results(program, blocks)
        if reason:
            raise PassError(f"Blocks of {program.name} cannot be taken out: {reason}.")
        self._check_count(program)

    def _check_count(self, program: Program) -> None:
        total = len(find_blocks(program))
        if self.remove:
            odd = sorted({i for i in self.remove if i >= total})
            if odd:
                raise PassError(
                    f"There is no block {odd[0]}: {program.name} has blocks 0 to {total - 1}.",
                    "Name existing ones in remove=[...].",
                )
        units = units_of(program, PARTS[self.part])
        if not units:
            raise PassError(
                f"No block of {program.name} is a sum of a stream and parts of kind {self.part!r}.",
                "Remove whole blocks: part=block.",
            )
        odd = sorted(i for i in self.remove if PruningUnit(i, self.part) not in units)
        if odd:
            where = block_name(program, find_blocks(program)[odd[0]])
            raise PassError(
                f"{where} (block {odd[0]}) has no {self.part} to remove: it is not a sum of the "
                "stream and such a part.",
                f"Leave {odd[0]} out of remove=[...], or remove whole blocks: part=block.",
            )
        count = self.count(program)
        if not 0 < count < len(units):
            raise PassError(
                f"{count} of {len(units)} cannot be removed: at least one must go and one stay.",
                f"Remove 1 to {len(units) - 1}." if len(units) > 1 else "Give another part=.",
            )

    def count(self, program: Program) -> int:
        """Return how many units go."""
        if self.remove:
            return len(self.remove)
        if self.blocks is not None:
            return self.blocks
        assert self.ratio is not None
        return math.ceil(self.ratio * len(units_of(program, PARTS[self.part])) - 1e-9)

    def milder(self, recipe: Sequence[str]) -> str:
        fewer = "take fewer blocks (prune-blocks{ratio=})"
        return fewer if "fuse-blocks" in recipe else f"{fewer}, or add fuse-blocks behind it"

    def forecast(self, program: Program, device: torch.device) -> Forecast:
        names = [block_name(program, block) for block in find_blocks(program)]
        units, count = units_of(program, PARTS[self.part]), self.count(program)
        if self.remove:
            gone = [PruningUnit(number, self.part) for number in self.remove]
            what = f"takes out {self._described(count, len(units))}: " + ", ".join(
                names[unit.block] for unit in gone
            )
        else:
            # Which go is measured; blocks of one stack are about alike in size.
            gone = units[-count:]
            what = f"takes out {self._described(count, len(units))}, chosen by {self.score}"
        left = program.copy()
        remove_sub_blocks(left, [(unit.block, unit.kind) for unit in gone])
        windows = on_device(self.windows, device) * on_device(self.seqlen, device)
        # A candidate is scored from where it stands on: half of the model on average.
        rounds = 0.0 if self.remove else 1.0 + (count - 1) * SCORED_AGAIN * self.iterative
        rounds += rounds * self.looks_back
        memory = 0 if self.remove else 4 * program.parameter_count()
        return Forecast(what, left, tokens=rounds * windows * len(units) / 2, memory=memory)

    def _described(self, count: int, total: int) -> str:
        kinds = {"block": "blocks", "attention": "attentions", "ffn": "feed-forward parts"}
        return f"{count} of {total} {kinds.get(self.part, 'parts of blocks')}"

    def run(self, program: Program, context: Context) -> PassResult:
        names = [block_name(program, block) for block in find_blocks(program)]
        units = units_of(program, PARTS[self.part])
        remedy = (
            "Lower windows or seqlen, or take score=bi, which keeps one stream, or --device cpu."
        )
        with must_fit(context.device, "Scoring blocks", remedy):
            choice = Chooser.of(self, program, context).all()
        skipped = [*outside_blocks(program), *choice.skipped]
        parameters = [program.parameter_count()]
        remove_sub_blocks(program, [(unit.block, unit.kind) for unit in choice.order])
        record = PrunedBlocks(
            order=[str(unit) for unit in choice.order],
            removed=[names[unit.block] for unit in choice.order],
            candidates=[str(unit) for unit in units],
            scores=choice.scores,
            perplexity=choice.perplexity,
            scoring_seconds=choice.seconds,
            tokens_per_second=choice.speed,
            parameters=[*parameters, program.parameter_count()],
            nearest=choice.nearest,
        )
        statement = RemovedParts(tuple((unit.block, unit.kind) for unit in choice.order))
        return PassResult(program, len(units), len(choice.order), skipped, record, statement)
