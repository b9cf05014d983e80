"""Depth pruning: the blocks, or parts of blocks, that matter least are taken out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from html import escape
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from graphopt.calibration.scores import Scores, Unit, final_results, score_units, units_of
from graphopt.calibration.text import (
    PERPLEXITY_WINDOWS,
    calibration_windows,
    forward_speed,
    held_out_perplexity,
    pick,
    window_length,
)
from graphopt.errors import PassError, UsageError
from graphopt.execute.interpreter import resident
from graphopt.ir.blocks import (
    block_name,
    find_blocks,
    private_results,
    remove_sub_blocks,
    sub_blocks,
)
from graphopt.ir.dtypes import scoring_dtype
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context, Pass, PassResult, register_pass
from graphopt.pass_manager.statements import RemovedParts
from graphopt.report.pictures import (
    axis,
    figure,
    halves,
    legend,
    perplexity_rows,
    removed_in_order,
    sentences,
)
from graphopt.report.record import Figure, Record, Seconds, Step, told_in_a_line
from graphopt.support.devices import must_fit
from graphopt.support.per_device import PerDevice, on_device

PARTS = {
    "block": ("block",),
    "attention": ("attention",),
    "ffn": ("ffn",),
    "any": ("attention", "ffn"),
}


class PrunedBlocks(Record):
    """What was removed, and by which scores.

    Attributes:
        order: Candidates in the order of their removal.
        removed: Names of the blocks that they are, or are parts of, in that order.
        candidates: All of them.
        scores: A round each, from the candidates that were left to their scores.
        perplexity: On held-out windows, of the whole model and after each removal.
        scoring_seconds: Of scoring alone.
        tokens_per_second: Of a forward pass, before and after.
    """

    order: list[str]
    removed: list[str]
    candidates: list[str] = Field(default_factory=list)
    scores: list[dict[str, Figure]] = Field(default_factory=list)
    perplexity: list[Step] = Field(default_factory=list)
    scoring_seconds: Seconds = 0.0
    tokens_per_second: list[Figure] = Field(default_factory=list)

    def line(self) -> str:
        return told_in_a_line(self.order, self.perplexity)

    def card(self) -> str:
        facts = [f"Scoring took {self.scoring_seconds:.1f} s."]
        if len(self.tokens_per_second) == 2:
            before, after = self.tokens_per_second
            if before and after:
                facts.append(
                    f"A forward pass takes in {before:,.0f} → {after:,.0f} tokens a second "
                    f"({after / before - 1:+.1%})."
                )
        return "".join(
            (
                removed_in_order(self.order),
                _score_picture(self.scores, self.order),
                halves([perplexity_rows(self.perplexity)]),
                sentences(facts),
            )
        )


def _score_picture(rounds: list[dict[str, float | None]], order: list[str]) -> str:
    """Return a bar for each candidate's score in the first round, by their decades."""
    first = rounds[0] if rounds else {}
    positive = [score for score in first.values() if score is not None and score > 0]
    if not positive:
        return ""
    lowest, highest = min(positive), max(positive)
    decades = math.log(highest / lowest) or 1.0
    bars: list[str] = []
    marks: list[str] = []
    for index, (unit, score) in enumerate(first.items()):
        # The lowest has a bar too, and so has what scores nothing.
        height = 4.0
        if score is not None and score > 0:
            height = 100 - 96 * math.log(highest / score) / decades
        style = "attention"
        title = [unit]
        for number, scored in enumerate(rounds, 1):
            if unit in scored:
                title.append(f"round {number}: {figure(scored[unit], 4)}")
        if unit in order:
            place = order.index(unit) + 1
            style = "ffn"
            title.append(f"removed as number {place}")
            middle = 100 * (index + 0.5) / len(first)
            marks.append(f'<span style="left:{middle:.2f}%">{place}</span>')
        bars.append(
            f"<g><title>{escape(chr(10).join(title))}</title>"
            f'<rect class="track" x="{index + 0.08:.2f}" width="0.84" height="100"/>'
            f'<rect class="{style}" x="{index + 0.08:.2f}" y="{100 - height:.2f}" width="0.84" '
            f'height="{height:.2f}"/></g>'
        )
    units = list(first)
    note = (
        f"Scores of the first round, from {figure(lowest)} to {figure(highest)} on a "
        "logarithmic scale."
    )
    if len(rounds) > 1:
        note += f" Point at a bar for all {len(rounds)} rounds."
    colours = legend([("attention", "kept"), ("ffn", "removed; the number is its turn")])
    return (
        f'<p class="dim">{note}</p>'
        f'<div class="scroll"><div style="min-width:{14 * len(first)}px">'
        f'<svg class="columns low" viewBox="0 0 {len(first)} 100" preserveAspectRatio="none" '
        f'role="img" aria-label="scores by candidate">{"".join(bars)}</svg>'
        f'<div class="marks">{"".join(marks)}</div>{axis(units[0], units[-1])}'
        f"</div></div>{colours if order else ''}"
    )


@register_pass
@dataclass
class PruneBlocks(Pass):
    """Take out the blocks that change the results least.

    Give one of `ratio` (a share of the blocks, rounded up), `blocks` (how many) and `remove`
    (which, from 0). What is scored is chosen by `part`: whole blocks, their attentions, their
    feed-forward parts, or either of these two.

    Scores come from `windows` windows of `seqlen` tokens of the calibration text, by default 8
    of 512 on a GPU and 2 of 256 on a CPU, or shorter ones where the model takes fewer tokens;
    see `graphopt.calibration.scores.METRICS`. Where `iterative`, everything is scored again after
    each removal. Scores `mi` and `kl` compare with the `reference`: the `original` model, or the
    `current` one, from which what was removed before is missing; the others need none. Equal
    scores go to the lowest index. Blocks that are listed are not scored.

    Source of macro influence and of the loop: FuseGPT, arXiv 2411.14507, equation 1 and
    algorithm 1, where the reference is the current model.

    Legality:

    1. The program has at least two blocks: calls that take a stream and give it back in the
       same type.
    2. A block's result is read by the next call alone, so that leaving it out changes what one
       call reads.
    3. Parts of blocks are terms added to the stream; a block that is no such sum has none.
    4. At least one block is left.
    """

    name: ClassVar[str] = "prune-blocks"
    record: ClassVar[type[Record]] = PrunedBlocks
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    blocks: Annotated[int, Field(ge=1)] | None = None
    remove: list[Annotated[int, Field(ge=0)]] = field(default_factory=list)
    part: Literal["block", "attention", "ffn", "any"] = "block"
    score: Literal["mi", "bi", "angular", "kl", "ppl"] = "mi"
    iterative: bool = True
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
        if len(set(self.remove)) != len(self.remove):
            raise UsageError("remove=[...] names a block twice.", "Name each once.")
        if self.remove and self.part == "any":
            raise UsageError(
                "remove=[...] with part=any does not say which parts.",
                "Give part=attention, part=ffn or part=block.",
            )

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
        odd = sorted(i for i in self.remove if Unit(i, self.part) not in units)
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

    def run(self, program: Program, context: Context) -> PassResult:
        names = [block_name(program, block) for block in find_blocks(program)]
        units = units_of(program, PARTS[self.part])
        remedy = (
            "Lower windows or seqlen, or take score=bi, which keeps one stream, or --device cpu."
        )
        with must_fit(context.device, "Scoring blocks", remedy):
            choice = Chooser(self, program, context).all()
        remove_sub_blocks(program, [(unit.block, unit.kind) for unit in choice.order])
        record = PrunedBlocks(
            order=[str(unit) for unit in choice.order],
            removed=[names[unit.block] for unit in choice.order],
            candidates=[str(unit) for unit in units],
            scores=choice.scores,
            perplexity=choice.perplexity,
            scoring_seconds=choice.seconds,
            tokens_per_second=choice.speed,
        )
        statement = RemovedParts(tuple((unit.block, unit.kind) for unit in choice.order))
        return PassResult(
            program, len(units), len(choice.order), record=record, statement=statement
        )


@dataclass
class Choice:
    """What goes, and why.

    Attributes:
        order: Units of the given program, in the order of their removal.
        scores: For every round the score of each candidate left, by name.
        perplexity: On held-out windows, of the whole model and after each removal.
        speed: Tokens a second of a forward pass, before and after.
        seconds: Of scoring alone.
    """

    order: list[Unit] = field(default_factory=list)
    scores: list[dict[str, float | None]] = field(default_factory=list)
    perplexity: list[Step] = field(default_factory=list)
    speed: list[float | None] = field(default_factory=list)
    seconds: float = 0.0


class Chooser:
    """The loop of scoring and removing.

    Raises:
        PassError: The calibration text is too short.
        SourceError: The model has no tokenizer, or a weight cannot be read.
    """

    def __init__(self, options: PruneBlocks, program: Program, context: Context) -> None:
        self.options, self.context = options, context
        self.device = context.device
        self.dtype = scoring_dtype(program, self.device)
        length = window_length(program, options.seqlen, self.device)
        windows = calibration_windows(program, context, length)
        # Held-out windows are the last ones; scores come from the others, where there are more.
        self.checked = windows[-PERPLEXITY_WINDOWS:]
        scored = windows[:-PERPLEXITY_WINDOWS] if len(windows) > PERPLEXITY_WINDOWS else windows
        self.windows = pick(scored, on_device(options.windows, self.device), context.seed)
        self.program = resident(program, self.dtype, self.device)

    def all(self) -> Choice:
        """Return what goes, in which order, without changing the program."""
        options, choice = self.options, Choice()
        units = units_of(self.program, PARTS[options.part])
        count = options.count(self.program)
        base: list[Tensor] | None = None
        if options.reference == "original" and options.score in ("mi", "kl"):
            base = final_results(
                self.program, self.windows, options.score, device=self.device, dtype=self.dtype
            )
        self._note("the whole model", self.program, choice)
        if options.remove:
            choice.order = [Unit(index, options.part) for index in options.remove]
            self._note("removing all of them", self._without(choice.order), choice)
        left = list(units)
        while len(choice.order) < count:
            started = time.perf_counter()
            current = self._without(choice.order)
            scores = self.score(current, self._renamed(left, choice.order), base)
            choice.seconds += time.perf_counter() - started
            named = dict(zip(left, scores.values.values(), strict=True))
            choice.scores.append({str(unit): score for unit, score in named.items()})
            rounds = 1 if options.iterative else count
            for _ in range(rounds):
                unit = Scores(named, 0).lowest()
                choice.order.append(unit)
                left.remove(unit)
                del named[unit]
                self._note(f"removing {unit}", self._without(choice.order), choice)
        for model in (self.program, self._without(choice.order)):
            choice.speed.append(forward_speed(model, self.windows, self.device, self.dtype))
        return choice

    def score(self, program: Program, units: list[Unit], base: list[Tensor] | None) -> Scores:
        """Score units of a program that is in memory."""
        return score_units(
            program, units, self.windows, self.options.score,
            device=self.device, dtype=self.dtype, reference=base, progress=self.context.progress,
        )  # fmt: skip

    def _without(self, units: list[Unit]) -> Program:
        program = self.program.copy()
        if units:
            remove_sub_blocks(program, [(unit.block, unit.kind) for unit in units])
        return program

    def _renamed(self, left: list[Unit], gone: list[Unit]) -> list[Unit]:
        """Return what units of the whole program are called in the one without `gone`."""
        blocks = find_blocks(self.program)
        lost: set[int] = set()
        for index, block in enumerate(blocks):
            kinds = {unit.kind for unit in gone if unit.block == index}
            function = self.program.functions[self.program.calls[block.position].function]
            parts = {part.kind for part in sub_blocks(function, block.stream)}
            if "block" in kinds or (parts and parts <= kinds):
                lost.add(index)
        return [
            Unit(unit.block - sum(index < unit.block for index in lost), unit.kind) for unit in left
        ]

    def _note(self, what: str, program: Program, choice: Choice) -> None:
        value = held_out_perplexity(program, self.checked, self.device, self.dtype)
        choice.perplexity.append(Step(after=what, value=value))
