"""Which blocks, or parts of blocks, go: the loop of scoring, watching perplexity and removing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from graphopt.calibration.scores import PruningUnit, Scores, final_hidden, score_units, units_of
from graphopt.calibration.text import (
    PERPLEXITY_WINDOWS,
    calibration_windows,
    forward_speed,
    held_out_perplexity,
    pick,
    window_length,
)
from graphopt.execute.interpreter import resident
from graphopt.ir.blocks import remove_sub_blocks
from graphopt.ir.dtypes import scoring_dtype
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context, Skip
from graphopt.report.record import Step
from graphopt.support.per_device import on_device

if TYPE_CHECKING:
    from graphopt.passes.prune_blocks.prune_blocks import PruneBlocks

JUMP = 1.5
"""What a removal may multiply held-out perplexity by before others are tried in its place."""
ALTERNATIVES = 3
"""Units that are then tried, the next by their scores."""

PARTS = {
    "block": ("block",),
    "attention": ("attention",),
    "ffn": ("ffn",),
    "any": ("attention", "ffn"),
}


@dataclass
class Choice:
    """What goes, and why.

    Attributes:
        order: Units of the given program, in the order of their removal.
        scores: For every round the score of each candidate left, by name.
        perplexity: On held-out windows, of the whole model and after each removal.
        speed: Tokens a second of a forward pass, before and after.
        seconds: How long scoring took.
        skipped: What was left in though its score was the lowest, and why.
    """

    order: list[PruningUnit] = field(default_factory=list)
    scores: list[dict[str, float | None]] = field(default_factory=list)
    perplexity: list[Step] = field(default_factory=list)
    speed: list[float | None] = field(default_factory=list)
    seconds: float = 0.0
    skipped: list[Skip] = field(default_factory=list)


class Chooser:
    """The loop of scoring and removing.

    Args:
        windows: int64 [N, S], windows of the calibration text. The last ones are held out, and
            scores come from the others, where there are more.
    """

    def __init__(
        self, options: PruneBlocks, program: Program, windows: Tensor, context: Context
    ) -> None:
        self.options, self.context = options, context
        self.device = context.device
        self.dtype = scoring_dtype(program, self.device)
        self.checked = windows[-PERPLEXITY_WINDOWS:]
        scored = windows[:-PERPLEXITY_WINDOWS] if len(windows) > PERPLEXITY_WINDOWS else windows
        self.windows = pick(scored, on_device(options.windows, self.device), context.seed)
        self.program = resident(program, self.dtype, self.device)
        self.perplexities: list[float] = []

    @classmethod
    def of(cls, options: PruneBlocks, program: Program, context: Context) -> Chooser:
        """Return one that reads the calibration text.

        Raises:
            PassError: The text is too short.
            SourceError: The model has no tokenizer.
        """
        length = window_length(program, options.seqlen, context.device)
        return cls(options, program, calibration_windows(program, context, length), context)

    def all(self) -> Choice:
        """Return what goes, in which order, without changing the program."""
        options, choice = self.options, Choice()
        units = units_of(self.program, PARTS[options.part])
        count = options.count(self.program)
        base: list[Tensor] | None = None
        if options.reference == "original" and options.score in ("mi", "kl"):
            base = final_hidden(self.program, self.windows, device=self.device, dtype=self.dtype)
        self._step("the whole model", self._perplexity_without([]), choice)
        if options.remove:
            choice.order = [PruningUnit(index, options.part) for index in options.remove]
            self._step("removing all of them", self._perplexity_without(choice.order), choice)
        left = list(units)
        stopped = False
        while len(choice.order) < count and not stopped:
            named = self._scored(left, choice.order, base, choice)
            rounds = 1 if options.iterative else count
            for _ in range(rounds):
                unit = self._watched(named, count, choice)
                if unit is None:
                    stopped = True
                    break
                choice.order.append(unit)
                left.remove(unit)
                del named[unit]
        if options.look_back:
            self._look_back(left, base, choice)
        for model in (self.program, self._without(choice.order)):
            choice.speed.append(forward_speed(model, self.windows, self.device, self.dtype))
        return choice

    def _scored(
        self,
        left: list[PruningUnit],
        gone: list[PruningUnit],
        base: list[Tensor] | None,
        choice: Choice,
    ) -> dict[PruningUnit, float]:
        """Return the scores of the units that are left where others are gone."""
        started = time.perf_counter()
        named = score_units(
            self.program, left, self.windows, self.options.score,
            removed=gone, device=self.device, dtype=self.dtype, reference=base,
            progress=self.context.progress,
        ).values  # fmt: skip
        choice.seconds += time.perf_counter() - started
        choice.scores.append({str(unit): score for unit, score in named.items()})
        return named

    def _watched(
        self, named: Mapping[PruningUnit, float], count: int, choice: Choice
    ) -> PruningUnit | None:
        """Return the unit that goes next, or None where none may.

        It is the lowest by its score, unless held-out perplexity says that the score is blind.
        """
        known = dict(named)
        lowest = Scores(known, 0).lowest()
        whole, before = self.perplexities[0], self.perplexities[-1]
        tried = {lowest: self._perplexity_without([*choice.order, lowest])}
        if not tried[lowest] <= JUMP * before:
            for _ in range(min(ALTERNATIVES, sum(map(math.isfinite, known.values())) - 1)):
                del known[Scores(known, 0).lowest()]
                unit = Scores(known, 0).lowest()
                tried[unit] = self._perplexity_without([*choice.order, unit])
        best = min(tried, key=lambda unit: (_or_inf(tried[unit]), list(tried).index(unit)))
        most = self.options.max_perplexity
        if most is not None and not tried[best] <= most * whole:
            choice.skipped.append(
                Skip(
                    f"{count - len(choice.order)} of {count} removals",
                    f"without {best} held-out perplexity would be {tried[best]:.4g}, "
                    f"{tried[best] / whole:.3g} times the whole model's {whole:.4g}, and "
                    f"max_perplexity={most:g}",
                )
            )
            return None
        if best != lowest:
            choice.skipped.append(
                Skip(
                    str(lowest),
                    f"its score is the lowest, but without it held-out perplexity goes from "
                    f"{before:.4g} to {tried[lowest]:.4g}, and without {best} to {tried[best]:.4g}",
                )
            )
        self._step(f"removing {best}", tried[best], choice)
        return best

    def _look_back(
        self, left: list[PruningUnit], base: list[Tensor] | None, choice: Choice
    ) -> None:
        """Put back each removed unit once; the lowest goes, which may be another one."""
        for number, unit in enumerate(list(choice.order)):
            others = [other for other in choice.order if other != unit]
            candidates = sorted([*left, unit])
            named = self._scored(candidates, others, base, choice)
            better = Scores(named, 0).lowest()
            if named[better] >= named[unit]:
                continue
            value = self._perplexity_without([*others, better])
            if not value <= self.perplexities[-1]:
                continue
            choice.order[number] = better
            left.remove(better)
            left.append(unit)
            self._step(f"removing {better} in place of {unit}", value, choice)

    def lowest(self, program: Program) -> PruningUnit:
        """Return the unit that goes first from another program, which is its own reference."""
        return score_units(
            program, units_of(program, PARTS[self.options.part]), self.windows, self.options.score,
            device=self.device, dtype=self.dtype, progress=self.context.progress,
        ).lowest()  # fmt: skip

    def _without(self, units: list[PruningUnit]) -> Program:
        program = self.program.copy()
        if units:
            remove_sub_blocks(program, [(unit.block, unit.kind) for unit in units])
        return program

    def _perplexity_without(self, units: list[PruningUnit]) -> float:
        return held_out_perplexity(self._without(units), self.checked, self.device, self.dtype)

    def _step(self, what: str, value: float, choice: Choice) -> None:
        self.perplexities.append(value)
        choice.perplexity.append(Step(after=what, value=value))


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf
