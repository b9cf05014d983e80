"""One run of `prune-experts`: scores, the choice, dropping or merging, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.calibration.expert_saliency import ExpertActivity, measure_experts
from graphopt.calibration.reconstruction import Reconstruction
from graphopt.calibration.text import (
    calibration_windows,
    held_out_perplexity,
    pick,
    window_length,
)
from graphopt.ir.blocks import block_name, find_blocks
from graphopt.ir.dtypes import scoring_dtype
from graphopt.ir.graph import Program
from graphopt.ir.layer_config import decoder_config, shrink_expert_counts
from graphopt.ir.mixture import Mixture, find_mixtures, keep_experts
from graphopt.pass_manager.contract import Context, PassResult, Skip
from graphopt.pass_manager.expert_statements import KeptExperts, KeptOfMixture
from graphopt.pass_manager.outside_blocks import outside_blocks
from graphopt.passes.prune_experts.merging import Merged, merge_experts
from graphopt.passes.prune_experts.reconstruction import reconstruct_experts
from graphopt.passes.prune_experts.record import PrunedExperts, PrunedMixture
from graphopt.report.record import Step
from graphopt.support.clock import Clock
from graphopt.support.per_device import on_device

if TYPE_CHECKING:
    from graphopt.passes.prune_experts.prune_experts import PruneExperts

HELD_OUT_WINDOWS = 4
"""Windows, the last ones, on which perplexity is measured; nothing else is learnt from them than
which score is taken, and whether reconstruction is."""

TRIED = ("energy", "reap", "frequency")
"""The scores of which the best is taken; of equally good ones the first."""

RANDOM_DRAWS = 3
"""Choices of random experts whose perplexity the chosen ones' is compared with."""


class Pruning:
    """One run of the pass.

    Raises:
        PassError: The calibration text is too short.
        SourceError: The model has no tokenizer, or a weight cannot be read.
    """

    def __init__(self, options: PruneExperts, program: Program, context: Context) -> None:
        self.options, self.program, self.context = options, program, context
        self.device = context.device
        self.dtype = scoring_dtype(program, self.device)
        length = window_length(program, options.seqlen, self.device)
        windows = calibration_windows(program, context, length)
        # Held-out windows are the last ones; scores come from the others, where there are more.
        self.held_out = windows[-HELD_OUT_WINDOWS:]
        scored = windows[:-HELD_OUT_WINDOWS] if len(windows) > HELD_OUT_WINDOWS else windows
        self.windows = pick(scored, on_device(options.windows, self.device), context.seed)
        self.clock = Clock("scoring", "merging", "reconstructing", "measuring")
        places = {block.position: index for index, block in enumerate(find_blocks(program))}
        self.mixtures: dict[int, Mixture] = {}
        self.skipped = outside_blocks(program)
        self.score: str = options.score
        self.scores: dict[str, float | None] = {}
        found = find_mixtures(program)
        self.matched = len(found)
        for block, part in found:
            if isinstance(part, Mixture):
                self.mixtures[places[block.position]] = part
            else:
                self.skipped.append(Skip(block_name(program, block), part))

    def run(self) -> PassResult:
        options, program = self.options, self.program
        with self.clock.counting("scoring"):
            activity = measure_experts(
                program, self.mixtures, self.windows, self.device, self.context.progress
            )
        steps = [self._step("the whole model", program)]
        kept = self._chosen(activity)
        random: list[float | None] = []
        if options.score != "random":
            for draw in range(1, RANDOM_DRAWS + 1):
                random.append(self._perplexity(self._left(self._drawn(draw))))
        after = self._left(kept)
        steps.append(self._step("dropping experts", after))
        merged: dict[int, Merged] = {}
        if options.method == "merge":
            with self.clock.counting("merging"):
                merged = merge_experts(
                    program, after, self.mixtures, kept, activity, self.windows, self.device,
                    self.context.progress,
                )  # fmt: skip
            steps.append(self._step("merging them", after))
        reconstructions: list[Reconstruction] = []
        if options.reconstruct:
            plain = after.copy()
            with self.clock.counting("reconstructing"):
                reconstructions = reconstruct_experts(
                    program, after, kept, self.windows, self.device, self.context.progress
                )
            steps.append(self._step("reconstruction", after))
            if not _or_inf(steps[-1].value) < _or_inf(steps[-2].value):
                where, reason = "reconstruction", "held-out perplexity is no lower with it"
                self.skipped.append(Skip(where, reason))
                steps.append(Step(after="leaving that out", value=steps[-2].value))
                after, reconstructions = plain, []
        blocks = find_blocks(program)
        before_after = [
            (mixture.experts, len(kept[index])) for index, mixture in self.mixtures.items()
        ]
        shrink_expert_counts(decoder_config(after.config), *before_after[0])
        record = PrunedExperts(
            experts=before_after[0],
            mixtures=[
                PrunedMixture(
                    block_name(program, blocks[index]), list(kept[index]),
                    self._saliency(activity[index]),
                    activity[index].saliency("frequency").tolist(),
                    merged[index].into if index in merged else {},
                    merged[index].likeness if index in merged else {},
                )
                for index in self.mixtures
            ],
            score=self.score,
            tried=self.scores,
            reconstructions=reconstructions,
            perplexity=steps,
            random=random,
            parameters=(program.parameter_count(), after.parameter_count()),
            seconds=self.clock.seconds,
        )  # fmt: skip
        merging, solved = options.method == "merge", bool(reconstructions)
        statement = KeptExperts(
            tuple(KeptOfMixture(index, tuple(k), merging, solved) for index, k in kept.items())
        )
        return PassResult(after, self.matched, len(kept), self.skipped, record, statement)

    def _chosen(self, activity: Mapping[int, ExpertActivity]) -> dict[int, list[int]]:
        """Return which experts are left, by block."""
        if self.options.score == "random":
            return self._drawn(0)
        if self.options.score != "best":
            return self._by_score(activity, self.options.score)
        choices = {score: self._by_score(activity, score) for score in TRIED}
        self.scores = {score: self._perplexity(self._left(kept)) for score, kept in choices.items()}
        self.score = min(TRIED, key=lambda score: _or_inf(self.scores[score]))
        return choices[self.score]

    def _by_score(self, activity: Mapping[int, ExpertActivity], score: str) -> dict[int, list[int]]:
        return {
            index: self._highest(mixture, activity[index].saliency(score))
            for index, mixture in self.mixtures.items()
        }

    def _saliency(self, activity: ExpertActivity) -> list[float]:
        return [] if self.score == "random" else activity.saliency(self.score).tolist()

    def _drawn(self, draw: int) -> dict[int, list[int]]:
        """Return as many random experts of each mixture."""
        seed = self.context.seed * (RANDOM_DRAWS + 1) + draw
        generator = torch.Generator().manual_seed(seed)
        return {
            index: self._highest(mixture, torch.rand(mixture.experts, generator=generator))
            for index, mixture in self.mixtures.items()
        }

    def _highest(self, mixture: Mixture, scores: Tensor) -> list[int]:
        """Return the experts of the highest scores, as many of each group, ascending."""
        groups = mixture.groups.count
        size, gone = mixture.experts // groups, mixture.experts - self.options.left(mixture)
        kept: list[int] = []
        for group in range(groups):
            order = scores[group * size : (group + 1) * size].sort(stable=True).indices
            kept += (order[gone // groups :].sort().values + group * size).tolist()
        return kept

    def _left(self, kept: Mapping[int, Sequence[int]]) -> Program:
        program = self.program.copy()
        keep_experts(program, kept)
        return program

    def _step(self, what: str, program: Program) -> Step:
        return Step(after=what, value=self._perplexity(program))

    def _perplexity(self, program: Program) -> float:
        with self.clock.counting("measuring"):
            return held_out_perplexity(program, self.held_out, self.device, self.dtype)


def _or_inf(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf
