"""Weights, activations and KV caches in few bits, behind transforms that are trained for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from graphopt.errors import PassError, UsageError
from graphopt.ir.affine import unfolded
from graphopt.ir.affine_sites import find_sites
from graphopt.ir.blocks import find_blocks
from graphopt.ir.encoding import BITS
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context, Forecast, Pass, PassResult, register_pass
from graphopt.passes.flatquant.record import FlatQuantised
from graphopt.passes.flatquant.run import FlatQuantising
from graphopt.report.record import Record
from graphopt.support.devices import must_fit
from graphopt.support.per_device import PerDevice
from graphopt.training.forecast import forecast_training
from graphopt.training.options import TrainingOptions

WHOLE = 16
"""What stands for numbers that are not rounded."""


@register_pass
@dataclass
class FlatQuant(TrainingOptions, Pass):
    """Round weights, activations and KV caches to few bits behind affine transforms.

    Transforms stand where `insert-affine` puts them, and are folded as `fold-affine` does; behind
    each, what matrices read is rounded to `a` bits a token, and keys and values to `kv` bits a
    token and head. Weights are rounded to `w` bits for each output channel, or each `group` of
    neighbours. Transforms, scales and clips of a block are trained together on what the block
    gave before (FlatQuant, arXiv 2410.09426, section 3), with everything rounded, block after
    block; one clip for each transform. Then all weights are trained for a part of the seconds,
    `distil`, on the next-token distributions of the model as it was.

    With other kinds the transforms are fixed and clips alone are trained: `hadamard` is nearly
    QuaRot (arXiv 2404.00456), `scale` SmoothQuant and AWQ, `none` plain rounding. `steps=0` trains
    nothing: `kind=closed,steps=0` is the closed form alone, in seconds.

    `method=published` is the paper's recipe: plain squared errors, two clips for each linear,
    weight decay, 15 epochs where neither seconds nor steps are given, no distillation.

    Legality:

    1. Blocks are those that add to a residual stream; transforms stand as for `insert-affine`.
    2. A weight that is rounded is a matrix that one `linear` reads; a group divides its columns, or
       is halved until it does, down to 16; where none does, a row shares a scale.
    3. The calibration text has a window for training and one for checks.

    Options:
        w: Bits of weights, 2, 3, 4 or 8; 16 leaves them.
        a: Bits of what matrices read, 2 to 8; 16 leaves them.
        kv: Bits of keys and values, 2 to 8; 16 leaves them.
        group: Neighbours along the input that share a scale of weights; 0 for all of a row.
        kind: What the transforms are: trained (kronecker), or fixed.
        start: What trained transforms begin with.
        scale: Whether features are also scaled one by one where that is free.
        heads: Whether values and merged heads have transforms of their own.
        keys: Whether queries and keys are transformed.
        clip: Whether the range of codes is clipped.
        rounding: How codes of weights are chosen in the end: nearest, or by `quantize`'s GPTQ.
        inputs: What a block reads while it is trained: what it read before anything was rounded
            (dense), or what rounded blocks in front of it give.
        distil: The share of the seconds in which all weights are trained at the end; 0 for none.
        method: This recipe, or the paper's.
        windows: How many windows of the calibration text are learnt from and checked with.
        rate: The highest learning rate of transforms; by default 5e-3. Clips have ten times as
            much, and weights at the end a fifth of what is usual for them.
    """

    name: ClassVar[str] = "flatquant"
    record: ClassVar[type[Record]] = FlatQuantised
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("!kv-cache",)

    w: Annotated[int, Field(ge=2, le=16)] = 4
    a: Annotated[int, Field(ge=2, le=16)] = 4
    kv: Annotated[int, Field(ge=2, le=16)] = 4
    group: Annotated[int, Field(ge=0)] = 0
    kind: Literal["kronecker", "hadamard", "random", "closed", "scale", "none"] = "kronecker"
    start: Literal["closed", "hadamard", "random", "identity"] = "closed"
    scale: bool = True
    heads: bool = True
    keys: bool = True
    clip: bool = True
    rounding: Literal["rtn", "gptq"] = "rtn"
    inputs: Literal["dense", "rounded"] = "dense"
    distil: Annotated[float, Field(ge=0, lt=1)] = 0.4
    method: Literal["default", "published"] = "default"
    rate: Annotated[float, Field(gt=0)] | None = None
    windows: Annotated[int, Field(ge=2)] | PerDevice[int] = PerDevice(cpu=32, gpu=64)

    def check_options(self) -> None:
        """Refuse widths that nothing computes with.

        Raises:
            UsageError: Naming the option and the widths that there are.
        """
        if self.w not in (*BITS, WHOLE):
            raise UsageError(
                f"flatquant: w={self.w} bits are none that weights are packed in.",
                f"Give w={', '.join(map(str, BITS))}, or {WHOLE} to leave weights alone.",
            )
        for name in ("a", "kv"):
            if 8 < getattr(self, name) < WHOLE:
                raise UsageError(
                    f"flatquant: {name}={getattr(self, name)} bits are more than the 8 of a code.",
                    f"Give {name} from 2 to 8, or {WHOLE} to leave it alone.",
                )
        self.refuse_low_rank("flatquant trains transforms, clips and whole weights")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        """Refuse options that another one leaves without effect.

        Raises:
            UsageError: Naming both.
        """
        # What a method does in any case may be said.
        same = {"start": "random", "distil": 0, "generated_windows": 0}
        published = self.method == "published"
        given = {
            option: value
            for option, value in self.options().items()
            if not (published and option in same and value == same[option])
        }
        why: dict[str, str] = {}
        if published:
            why = {
                "kind": "method=published trains transforms, and those of kind={} are fixed",
                "start": "method=published begins with random transforms, and start={} does not",
                "clip": "method=published trains clips, and clip={} leaves them out",
                "distil": "method=published does not train whole weights, and distil={} would",
                "generated_windows": "method=published does not train whole weights, for which "
                "generated_windows={} are written",
            }
        elif self.kind != "kronecker":
            why = {"start": f"transforms of kind={self.kind} are not trained, and start={{}} is "
                            "what trained ones begin with"}  # fmt: skip
            if self.kind == "scale":
                why["scale"] = "kind=scale is nothing but scales, and scale={} leaves them out"
        for option, sentence in why.items():
            if option in given:
                told = sentence.format(str(given[option]).lower())
                raise UsageError(f"flatquant: {told}.", "Leave one of them out.")

    def check(self, program: Program) -> None:
        if not find_blocks(program) or not find_sites(program):
            raise PassError(
                f"{program.name} has no block with a matrix that could be rounded.",
                "Leave flatquant out.",
            )
        undone = next(filter(None, map(unfolded, program.functions.values())), None)
        if undone is not None:
            raise PassError(
                f"{program.name} has transforms with their inverses behind them ({undone}), and "
                "flatquant's own would be undone with these.",
                "Put fold-affine in front of flatquant, or leave insert-affine out.",
            )

    def milder(self, recipe: Sequence[str]) -> str:
        return "give more bits (flatquant{a=8}) or train for longer ({seconds=})"

    def forecast(self, program: Program, device: torch.device) -> Forecast:
        count = len(find_blocks(program))
        what = f"rounds {count} blocks to W{self.w}A{self.a}KV{self.kv} and trains them"
        return forecast_training(self, program, device, what)

    def run(self, program: Program, context: Context) -> PassResult:
        with must_fit(context.device, self.name, "Lower batch, windows or seqlen, or distil."):
            return FlatQuantising(self, program, context).run()
