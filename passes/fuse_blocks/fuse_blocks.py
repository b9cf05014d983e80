"""Recovery after depth pruning: what the removed blocks did is put back into those that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from graphopt.errors import UsageError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import (
    Context,
    Forecast,
    Pass,
    PassResult,
    Skip,
    register_pass,
)
from graphopt.pass_manager.statements import ChangedBlocks
from graphopt.passes.fuse_blocks.donor import Donor
from graphopt.passes.fuse_blocks.fusion import Fusion
from graphopt.passes.fuse_blocks.record import FusedBlocks
from graphopt.passes.prune_blocks.record import PrunedBlocks
from graphopt.report.record import Record
from graphopt.support.devices import must_fit
from graphopt.support.per_device import PerDevice
from graphopt.training.forecast import forecast_training
from graphopt.training.options import TrainingOptions


@register_pass
@dataclass
class FuseBlocks(TrainingOptions, Pass):
    """Train the blocks that `prune-blocks` left to do what the dense model did.

    `mode=distil` (the default) trains all remaining block weights on the dense model's next-token
    distributions. On a CPU, and where no step follows, the projections into the stream are first
    reconstructed in closed form (`graphopt.calibration.reconstruction`; `warm_start` says so for
    any device). `mode=local` trains `group` blocks at a time on the dense model's stream behind
    them, which is kept; the last group learns the distributions. `mode=published` is FuseGPT
    (arXiv 2411.14507, equations 2 to 6 and algorithm 1): a block is scored, removed and fused into
    its `group - 1` neighbours by low-rank coefficients, then the next; it repeats the choice of
    `prune-blocks` on the model fused so far, with that pass's options.

    Training lasts `seconds` or `steps`, whichever is given (150 seconds if neither), in all
    modes over all of their parts together. A step takes `batch` windows of `seqlen` tokens; by
    default 4 of 2048 on a GPU and one of 256 on a CPU, where steps are few (two in the published
    mode). `generated_windows` is how many windows the
    dense model writes itself, behind beginnings from the calibration text; by default none on a
    CPU, and on a GPU as many as a quarter of the seconds allows, or as a quarter of the steps
    reads.

    `train=low-rank` trains matrices by terms of that `rank` instead of whole. `donor` is what
    coefficients of the published mode multiply: the `pruned` block, the neighbour's own weight
    (`self`), a `random` matrix of the pruned one's size, or nothing (`none`). With `ablations`
    the first block is fused by each of the other donors too, in as many seconds or steps again,
    for the report alone.

    Legality:

    1. The recipe has `prune-blocks` before it, of whole blocks in the published mode.
    2. Blocks of a group have the same operations and weights of equal shapes.
    3. The calibration text has a window for training and one for checks.

    Options:
        mode: What is learnt: the dense model's next tokens (distil), its residual stream group by
            group (local), or FuseGPT as published.
        warm_start: Whether projections are first solved for in closed form.
        group: How many blocks are trained at a time, with mode=local or published.
        donor: With mode=published: what is fused into the neighbours.
        ablations: With mode=published: whether the first block is fused by each of the other donors
            too, for the report.
    """

    name: ClassVar[str] = "fuse-blocks"
    record: ClassVar[type[Record]] = FusedBlocks
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("prune-blocks",)

    batch: Annotated[int, Field(ge=1)] | PerDevice[int] = PerDevice(cpu=1, gpu=4)
    mode: Literal["distil", "local", "published"] = "distil"
    warm_start: bool | PerDevice[bool] = PerDevice(cpu=True, gpu=False)
    group: Annotated[int, Field(ge=2)] = 8
    donor: Donor = "pruned"
    ablations: bool = False

    def check_options(self) -> None:
        if self.ablations and self.mode != "published":
            raise UsageError(
                f"ablations compare donors, and mode={self.mode} has none.",
                "Give mode=published, or leave ablations out.",
            )
        if self.mode == "published" and self.batch == 1:
            raise UsageError(
                "The loss of mode=published compares sequences of a batch, and batch=1 has one.",
                "Give batch=2 or more.",
            )

    def milder(self, recipe: Sequence[str]) -> str:
        return "train for longer (fuse-blocks{seconds=}) and on text of your own (--calib)"

    def forecast(self, program: Program, device: torch.device) -> Forecast:
        count = len(find_blocks(program))
        return forecast_training(self, program, device, f"trains the {count} blocks that are left")

    def run(self, program: Program, context: Context) -> PassResult:
        remedy = (
            "Lower batch or seqlen, give generated_windows=0, or take mode=local or --device cpu."
        )
        pruned = context.record(PrunedBlocks)
        if pruned is not None and not pruned.removed:
            skipped = [Skip("all blocks", "prune-blocks removed none")]
            return PassResult(program, 0, 0, skipped, FusedBlocks(), ChangedBlocks())
        with must_fit(context.device, "fuse-blocks", remedy):
            return Fusion(self, program, context).run()
