"""Fewer experts: those that add least are dropped, or merged into those that are left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from graphopt.errors import PassError, UsageError
from graphopt.ir.blocks import block_name
from graphopt.ir.graph import Program
from graphopt.ir.mixture import (
    Mixture,
    check_experts_left,
    find_mixtures,
    least_experts,
)
from graphopt.pass_manager.contract import Context, Forecast, Pass, PassResult, register_pass
from graphopt.passes.prune_experts.record import PrunedExperts
from graphopt.passes.prune_experts.run import Pruning
from graphopt.report.record import Record
from graphopt.support.devices import must_fit
from graphopt.support.per_device import PerDevice, on_device


@register_pass
@dataclass
class PruneExperts(Pass):
    """Leave the mixtures of a model with fewer experts.

    Give one of `ratio` (the share of each mixture's experts that go, rounded up) and `experts`
    (how many go). All mixtures lose the same number, since a config has one number of experts; of
    groups of experts that a router chooses among first, each loses the same.

    What an expert adds is measured on `windows` windows of `seqlen` tokens of the calibration text:
    16 of 512 on a CPU, 64 of 2,048 on a GPU, or shorter ones where the model takes fewer tokens.
    The lowest go by `score`, one of `graphopt.calibration.expert_saliency.SCORES`, or `random`
    ones, which every score has to beat. By default three are tried, `energy`, `reap` (REAP, arXiv
    2510.13999) and `frequency`, and the one whose model has the lowest perplexity on held-out
    windows is taken: which of them is best depends on how evenly a router spreads tokens.

    Equal scores go to the lowest index; an expert that no token runs has score 0.

    With `method=drop` the experts go, and their rows of the router; tokens then run the experts of
    the highest logits among those that are left. With `method=merge` each of them is first merged
    into the one that is left whose outputs are most alike: their neurons are paired, and each pair
    is averaged by how many tokens ran the two
    (`graphopt.passes.prune_experts.merging`).

    With `reconstruct` the down projections of the experts that are left are then solved for by
    least squares, so that each mixture's output is nearest to what it was
    (`graphopt.passes.prune_experts.reconstruction`).

    Perplexity on held-out windows is measured before and after, and beside that of three draws of
    random experts: where the model is worse than their median, the pass says so.

    Legality:

    1. A block has one mixture of experts whose tokens are sorted by expert for grouped products,
       and whose router is a linear with a row an expert. Others are left as they are.
    2. As many experts are left as a token runs at least, and in each group as many as its score is
       made of.
    3. Where the number of experts stands in the nodes of a mixture, it is an argument that follows:
       of a reshape, a histogram, or what is expanded to it.

    Options:
        ratio: The share of each mixture's experts that go, rounded up.
        experts: How many experts of each mixture go.
        score: By what they are chosen; best tries energy, reap and frequency, and random is the
            control.
        method: Whether experts are dropped, or first merged into the most alike of those left.
        reconstruct: Whether down projections are then solved for by least squares.
        windows: How many windows of the calibration text are measured.
        seqlen: Tokens of a window.
    """

    name: ClassVar[str] = "prune-experts"
    record: ClassVar[type[Record]] = PrunedExperts
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    experts: Annotated[int, Field(ge=1)] | None = None
    score: Literal["best", "energy", "reap", "ean", "frequency", "random"] = "best"
    method: Literal["drop", "merge"] = "drop"
    reconstruct: bool = True
    windows: Annotated[int, Field(ge=1)] | PerDevice[int] = PerDevice(cpu=16, gpu=64)
    seqlen: Annotated[int, Field(ge=2)] | PerDevice[int] = PerDevice(cpu=512, gpu=2048)

    def check_options(self) -> None:
        if (self.ratio is None) == (self.experts is None):
            raise UsageError(
                "prune-experts takes one of ratio and experts, and was given "
                f"{'none' if self.ratio is None else 'both'}.",
                "Write prune-experts{ratio=0.25}, or experts=2.",
            )

    def check(self, program: Program) -> None:
        found = find_mixtures(program)
        mixtures = [
            (block_name(program, block), block, part)
            for block, part in found
            if isinstance(part, Mixture)
        ]
        if not mixtures:
            reasons = sorted({part for _, part in found if isinstance(part, str)})
            raise PassError(
                f"{program.name} has no mixture of experts to prune"
                + (f": {'; '.join(reasons)}." if reasons else "."),
                "Leave prune-experts out of the recipe.",
            )
        known: set[str] = set()
        for where, block, mixture in mixtures:
            self._check_count(where, mixture)
            # Layers that are alike are left with fewer experts alike.
            function = program.calls[block.position].function
            if function in known:
                continue
            known.add(function)
            try:
                check_experts_left(program, block, self.left(mixture))
            except ValueError as error:
                raise PassError(f"{where} cannot be left with fewer experts: {error}.") from error

    def _check_count(self, where: str, mixture: Mixture) -> None:
        left, least, groups = self.left(mixture), least_experts(mixture), mixture.groups
        if self.experts is not None and self.experts % groups.count:
            raise PassError(
                f"{where} has {mixture.experts} experts in {groups.count} groups, which stay "
                f"equal, so that {self.experts} cannot go.",
                f"Give a multiple of {groups.count} as experts, or ratio.",
            )
        if left < least:
            each = f", in groups of {least // groups.count}" if groups.count > 1 else ""
            raise PassError(
                f"{where} has {mixture.experts} experts, and {mixture.experts - left} of them "
                f"cannot go: a token runs {mixture.top_k}, so that {least} are left at "
                f"least{each}.",
                "Lower ratio or experts."
                if mixture.experts > least
                else "Leave prune-experts out of the recipe.",
            )

    def left(self, mixture: Mixture) -> int:
        """Return how many experts of a mixture are left."""
        if self.experts is not None:
            return mixture.experts - self.experts
        assert self.ratio is not None
        size = mixture.experts // mixture.groups.count
        return (size - math.ceil(self.ratio * size - 1e-9)) * mixture.groups.count

    def milder(self, recipe: Sequence[str]) -> str:
        return "drop fewer experts (prune-experts{ratio=})"

    def forecast(self, program: Program, device: torch.device) -> Forecast:
        mixtures = [m for _, m in find_mixtures(program) if isinstance(m, Mixture)]
        kinds = Counter((self.left(mixture), mixture.experts) for mixture in mixtures)
        what = ", ".join(
            f"leaves {left} of {experts} experts in {count} mixtures"
            for (left, experts), count in kinds.items()
        )
        tokens = on_device(self.windows, device) * on_device(self.seqlen, device)
        tried = 3 if self.score == "best" else 1
        # The model as it is, each choice, and three draws of random experts.
        return Forecast(what, tokens=float(tokens * (4 + tried)))

    def run(self, program: Program, context: Context) -> PassResult:
        remedy = "Lower windows or seqlen, or take --device cpu."
        with must_fit(context.device, "Scoring experts", remedy):
            return Pruning(self, program, context).run()
