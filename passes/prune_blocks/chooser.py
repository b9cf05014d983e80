"""Which blocks, or parts of blocks, go: the loop of scoring, watching perplexity and removing."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from graphopt.calibration.scores import (
    PruningUnit,
    Removal,
    Scores,
    final_hidden,
    score_removals,
    score_units,
    units_of,
)
from graphopt.calibration.text import (
    PERPLEXITY_WINDOWS,
    calibration_windows,
    forward_speed,
    held_out_perplexity,
    pick_apart,
    window_length,
)
from graphopt.calibration.vocabulary import narrow_head, tokens_to_compare
from graphopt.execute.interpreter import resident
from graphopt.ir.blocks import remove_sub_blocks
from graphopt.ir.dtypes import scoring_dtype
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context, Skip
from graphopt.passes.prune_blocks.record import ScoredSet
from graphopt.report.record import Step
from graphopt.support.per_device import PerDevice, on_device

if TYPE_CHECKING:
    from graphopt.passes.prune_blocks.prune_blocks import PruneBlocks

JUMP = 1.5
"""What a removal may multiply held-out perplexity by before others are tried in its place."""
ALTERNATIVES = 3
"""Units that are then tried, the next by their scores."""
OF_LOGITS = ("kl", "ppl")
"""Scores from which a norm behind the blocks hides nothing."""
SCORED_AT_ONCE = 8
"""Units that are scored before it is asked whether others may be lower: a walk takes as many."""
LEAST_GAIN = 1e-3
"""The share by which an exchange has to lower the score: what is less is noise."""
SWEEPS = 3
"""How often each removed unit is put back at most."""
NEAREST = 8
"""How many of the sets with the lowest scores are compared again."""
MORE_TEXT = PerDevice(cpu=8, gpu=4)
"""On how many times the text: divergences of some thousand tokens differ by a few percent."""

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
        nearest: The sets with the lowest scores, where they were compared on more text.
    """

    order: list[PruningUnit] = field(default_factory=list)
    scores: list[dict[str, float | None]] = field(default_factory=list)
    perplexity: list[Step] = field(default_factory=list)
    speed: list[float | None] = field(default_factory=list)
    seconds: float = 0.0
    skipped: list[Skip] = field(default_factory=list)
    nearest: list[ScoredSet] = field(default_factory=list)


class Chooser:
    """The loop of scoring and removing, and the search for a better set that follows it.

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
        count = on_device(options.windows, self.device)
        self.windows, self.others = pick_apart(
            scored, count, MORE_TEXT.on(self.device) * count, context.seed
        )
        self.program = resident(program, self.dtype, self.device)
        self.perplexities: list[float] = []
        self.sets: dict[Removal, float] = {}
        self.added: dict[PruningUnit, float] = {}
        self.refused: set[Removal] = set()

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
        left = units_of(self.program, PARTS[options.part])
        count = options.count(self.program)
        self._step("the whole model", self._perplexity_without([]), choice)
        if options.remove:
            choice.order = [PruningUnit(index, options.part) for index in options.remove]
            self._step("removing all of them", self._perplexity_without(choice.order), choice)
        stopped = False
        while len(choice.order) < count and not stopped:
            named = self._scored(left, choice.order, choice)
            choice.scores.append({str(unit): score for unit, score in named.items()})
            rounds = 1 if options.iterative else count
            for _ in range(rounds):
                unit = self._watched(named, count, choice)
                if unit is None:
                    stopped = True
                    break
                choice.order.append(unit)
                left.remove(unit)
                del named[unit]
        if options.looks_back:
            self._look_back(left, choice)
            if not stopped:
                self._try_best_run(left, choice)
            self._compare_nearest(left, choice)
        for model in (self.program, self._without(choice.order)):
            choice.speed.append(forward_speed(model, self.windows, self.device, self.dtype))
        return choice

    @property
    def _rise(self) -> float:
        """By what perplexity may rise against what a score says of two units.

        A score of the logits sees what perplexity sees, on more tokens; another may be blind.
        """
        return JUMP if self.options.score in OF_LOGITS else 1.0

    @functools.cached_property
    def _compared(self) -> Program:
        """The program that is scored: of a large vocabulary, `kl` compares some tokens."""
        if self.options.score != "kl":
            return self.program
        tokens = tokens_to_compare(self.program, self.windows, self.device, self.dtype)
        narrowed = None if tokens is None else narrow_head(self.program, tokens)
        return narrowed or self.program

    @functools.cached_property
    def _reference(self) -> list[Tensor] | None:
        """The whole model's hidden states, where they are what is compared with."""
        if self.options.reference == "current" or self.options.score not in ("mi", "kl"):
            return None
        return final_hidden(self.program, self.windows, device=self.device, dtype=self.dtype)

    def _scored(
        self, left: Sequence[PruningUnit], gone: Sequence[PruningUnit], choice: Choice
    ) -> dict[PruningUnit, float]:
        """Return the scores of units where others are gone, of those that may be the lowest.

        What a unit adds to the score seldom falls as others go. So units are scored in the order of
        what they added last, until none is left that added less than the lowest does now: lazy
        greedy search (Minoux 1978), which finds what scoring all of them does, if it never falls.
        """
        started = time.perf_counter()
        if self.options.scores_sets:
            named = self._lazily_scored(left, frozenset(gone))
        else:
            named = score_units(
                self._compared, left, self.windows, self.options.score,
                removed=gone, device=self.device, dtype=self.dtype,
                progress=self.context.progress,
            ).values  # fmt: skip
        choice.seconds += time.perf_counter() - started
        return named

    def _lazily_scored(
        self, left: Sequence[PruningUnit], gone: Removal
    ) -> dict[PruningUnit, float]:
        named: dict[PruningUnit, float] = {}
        waiting = sorted(left, key=lambda unit: self.added.get(unit, -math.inf))
        lowest = math.inf
        while waiting and not (named and self.added.get(waiting[0], -math.inf) >= lowest):
            new = [unit for unit in waiting if unit not in self.added]
            several = new or waiting[:SCORED_AT_ONCE]
            sets = [gone | {unit} for unit in several]
            self._known_scores([gone, *sets])
            for unit, removal in zip(several, sets, strict=True):
                waiting.remove(unit)
                named[unit] = self.sets[removal]
                self.added[unit] = _or_inf(named[unit] - self.sets[gone])
                lowest = min(lowest, self.added[unit])
        return {unit: named[unit] for unit in left if unit in named}

    def _known_scores(self, removals: Sequence[Removal]) -> Mapping[Removal, float]:
        """Return the scores of all sets so far, these among them."""
        unknown = [removal for removal in removals if removal not in self.sets]
        if unknown:
            self.sets |= self._set_scores(unknown)
        return self.sets

    def _set_scores(self, removals: Sequence[Removal]) -> dict[Removal, float]:
        return score_removals(
            self._compared, removals, self.windows, self.options.score,
            device=self.device, dtype=self.dtype, reference=self._reference,
            progress=self.context.progress,
        )  # fmt: skip

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
        if tried[lowest] <= self._rise * tried[best]:
            best = lowest
        self.refused |= {
            frozenset([*choice.order, unit])
            for unit, value in tried.items()
            if not value <= JUMP * tried[best]
        }
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

    def _look_back(self, left: list[PruningUnit], choice: Choice) -> None:
        """Exchange removed units for others, while that lowers the score.

        The last one was chosen among all that are left, and waits until another was exchanged.
        """
        self._exchange(
            choice.order, choice.order[:-1], left, choice,
            lambda unit, better: self._exchanged([unit], [better], choice),
        )  # fmt: skip

    def _try_best_run(self, left: list[PruningUnit], choice: Choice) -> None:
        """Begin again with the best run of neighbours; the lower of the two ends goes.

        Neighbours that go together often cost less than the first of them lets greed expect.
        """
        known = self.sets[frozenset(choice.order)]
        units = sorted([*left, *choice.order])
        runs = [
            units[start : start + len(choice.order)]
            for start in range(len(units) - len(choice.order) + 1)
        ]
        started = time.perf_counter()
        scores = self._known_scores([frozenset(run) for run in runs])
        choice.seconds += time.perf_counter() - started
        run = min(runs, key=lambda run: _or_inf(scores[frozenset(run)]))
        if not scores[frozenset(run)] < JUMP * _or_inf(known):
            return
        # What units add where greed went is no bound on what they add here.
        self.added.clear()
        others = [unit for unit in units if unit not in run]
        self._exchange(run, list(run), others, choice, lambda *_: True)
        back, gone = sorted({*choice.order} - {*run}), sorted({*run} - {*choice.order})
        lowest = self.sets[frozenset(run)]
        if lowest < (1 - LEAST_GAIN) * _or_inf(known) and self._exchanged(back, gone, choice):
            left[:] = sorted({*left, *back} - {*gone})

    def _exchange(
        self,
        order: list[PruningUnit],
        waiting: list[PruningUnit],
        left: list[PruningUnit],
        choice: Choice,
        accept: Callable[[PruningUnit, PruningUnit], bool],
    ) -> None:
        """Put removed units back, one at a time; the lowest goes, which may be another one.

        It ends when no exchange lowers the score, or after `SWEEPS` tries for each unit.

        Args:
            order: What is removed; changed in place, as is what is left.
            waiting: Units of `order` that are put back.
            accept: Called with a unit and what is to go in its place.
        """
        for _ in range(SWEEPS * len(order)):
            if not waiting:
                break
            unit = waiting.pop(0)
            gone = [other for other in order if other != unit]
            named = self._scored(sorted([*left, unit]), gone, choice)
            better = Scores(named, 0).lowest()
            if not named[better] < (1 - LEAST_GAIN) * _or_inf(named[unit]):
                continue
            if accept(unit, better):
                order[:] = [better if other == unit else other for other in order]
                left[left.index(better)] = unit
                # What another unit is worth may have changed with this one.
                waiting += [other for other in gone if other not in waiting]

    def _compare_nearest(self, left: list[PruningUnit], choice: Choice) -> None:
        """Score the sets of the lowest scores on more text; the lowest there goes.

        Where that is another one than before, its own neighbours, of one unit exchanged, are
        scored, and the lowest of all sets compared again.
        """
        if not len(self.others):
            return
        on_more_text: dict[Removal, float] = {}
        for _ in range(SWEEPS):
            current = frozenset(choice.order)
            known = {
                removal: score
                for removal, score in sorted(self.sets.items(), key=lambda item: _or_inf(item[1]))
                if len(removal) == len(current) and removal not in self.refused
            }
            nearest = [current, *(removal for removal in known if removal != current)][:NEAREST]
            new = [removal for removal in nearest if removal not in on_more_text]
            if new:
                started = time.perf_counter()
                on_more_text |= self._scores_on_more_text(new)
                choice.seconds += time.perf_counter() - started
            for removal in sorted(on_more_text, key=lambda removal: _or_inf(on_more_text[removal])):
                back, gone = sorted(current - removal), sorted(removal - current)
                if not back or self._exchanged(back, gone, choice):
                    break
            if not back:
                break
            left[:] = sorted({*left, *back} - {*gone})
            for unit in choice.order:
                others = [other for other in choice.order if other != unit]
                self._scored(sorted([*left, unit]), others, choice)
        choice.nearest = [
            ScoredSet(
                units=[str(unit) for unit in sorted(removal)],
                score=self.sets.get(removal),
                on_more_text=score,
            )
            for removal, score in on_more_text.items()
        ]

    def _scores_on_more_text(self, removals: Sequence[Removal]) -> dict[Removal, float]:
        return score_removals(
            self._compared, removals, self.others, self.options.score,
            device=self.device, dtype=self.dtype, progress=self.context.progress,
        )  # fmt: skip

    def _exchanged(
        self, back: Sequence[PruningUnit], gone: Sequence[PruningUnit], choice: Choice
    ) -> bool:
        """Remove units in place of others, unless held-out perplexity is against it."""
        order = list(choice.order)
        if frozenset(choice.order) - {*back} | {*gone} in self.refused:
            return False
        for unit, other in zip(back, gone, strict=True):
            order[order.index(unit)] = other
        value = self._perplexity_without(order)
        most = (self.options.max_perplexity or math.inf) * self.perplexities[0]
        put_back, removed = (", ".join(map(str, units)) for units in (back, gone))
        if not value <= min(most, self._rise * self.perplexities[-1]):
            self.refused.add(frozenset(order))
            choice.skipped.append(
                Skip(
                    f"removing {removed} in place of {put_back}",
                    f"the score would be lower, but held-out perplexity would go from "
                    f"{self.perplexities[-1]:.4g} to {value:.4g}",
                )
            )
            return False
        choice.order = order
        self._step(f"removing {removed} in place of {put_back}", value, choice)
        return True

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
