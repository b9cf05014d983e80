"""One run of `prune-experts`: scores, the choice, dropping or merging, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.calibration.expert_saliency import ExpertActivity, measure_experts
from graphopt.calibration.text import (
    PERPLEXITY_WINDOWS,
    calibration_windows,
    held_out_perplexity,
    pick,
    window_length,
)
from graphopt.ir.blocks import block_name, find_blocks
from graphopt.ir.dtypes import scoring_dtype
from graphopt.ir.graph import Program
from graphopt.ir.layer_config import shrink_expert_counts
from graphopt.ir.mixture import Mixture, find_mixtures, keep_experts
from graphopt.pass_manager.contract import Context, PassResult, Skip
from graphopt.pass_manager.expert_statements import KeptExperts, KeptOfMixture
from graphopt.passes.prune_experts.merging import Merged, merge_experts
from graphopt.passes.prune_experts.record import PrunedExperts, PrunedMixture
from graphopt.report.record import Step
from graphopt.support.clock import Clock
from graphopt.support.per_device import on_device

if TYPE_CHECKING:
    from graphopt.passes.prune_experts.prune_experts import PruneExperts

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
        self.held_out = windows[-PERPLEXITY_WINDOWS:]
        scored = windows[:-PERPLEXITY_WINDOWS] if len(windows) > PERPLEXITY_WINDOWS else windows
        self.windows = pick(scored, on_device(options.windows, self.device), context.seed)
        self.clock = Clock("scoring", "merging", "measuring")
        places = {block.position: index for index, block in enumerate(find_blocks(program))}
        self.mixtures: dict[int, Mixture] = {}
        self.skipped: list[Skip] = []
        for block, part in find_mixtures(program):
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
        kept = self._chosen(activity)
        steps = [self._step("the whole model", program)]
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
        blocks = find_blocks(program)
        before_after = [
            (mixture.experts, len(kept[index])) for index, mixture in self.mixtures.items()
        ]
        shrink_expert_counts(after.config, *before_after[0])
        record = PrunedExperts(
            experts=before_after[0],
            mixtures=[
                PrunedMixture(
                    block_name(program, blocks[index]), list(kept[index]),
                    self._saliency(activity[index]).tolist(),
                    activity[index].saliency("frequency").tolist(),
                    merged[index].into if index in merged else {},
                    merged[index].likeness if index in merged else {},
                )
                for index in self.mixtures
            ],
            perplexity=steps,
            random=random,
            parameters=(program.parameter_count(), after.parameter_count()),
            seconds=self.clock.seconds,
        )  # fmt: skip
        statement = KeptExperts(
            tuple(
                KeptOfMixture(index, tuple(experts), merged=options.method == "merge")
                for index, experts in kept.items()
            )
        )
        matched = len(self.mixtures) + len(self.skipped)
        return PassResult(after, matched, len(kept), self.skipped, record, statement)

    def _chosen(self, activity: Mapping[int, ExpertActivity]) -> dict[int, list[int]]:
        """Return which experts are left, by block."""
        if self.options.score == "random":
            return self._drawn(0)
        return {
            index: self._highest(mixture, self._saliency(activity[index]))
            for index, mixture in self.mixtures.items()
        }

    def _saliency(self, activity: ExpertActivity) -> Tensor:
        score = self.options.score
        return torch.zeros(0) if score == "random" else activity.saliency(score)

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
