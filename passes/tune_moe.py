"""Training after `carve-moe`: experts, shared neurons and the router learn from the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.devices import must_fit
from graphopt.distil import Distiller, TrainingOptions
from graphopt.errors import PassError
from graphopt.ir.graph import Program
from graphopt.passes.base import Context, Pass, PassResult, register_pass


@register_pass
@dataclass
class TuneMoe(TrainingOptions, Pass):
    """Train a carved model on the dense model's next-token distributions.

    All weights of the blocks are trained: of experts, of what is shared, of attention and of the
    router. A choice of experts has no gradient, so the router learns by that of a soft choice in
    its place (`graphopt.ir.ops.experts.TopGates`).

    Training lasts `seconds` or `steps`, whichever is given (150 seconds if neither). A step
    takes `batch` windows of `seqlen` tokens; by default 4 of 2048 on a GPU and 2 of 256 on a
    CPU. `own_text` and `train=low-rank` with its `rank` are as for `fuse-blocks`.

    Legality:

    1. The recipe has `carve-moe` before it.
    2. The calibration text has a window for training and one for checks.
    """

    name: ClassVar[str] = "tune-moe"
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("carve-moe",)

    def check(self, program: Program) -> None:
        self.check_training(self.name)

    def run(self, program: Program, context: Context) -> PassResult:
        if context.dense is None or "carve-moe" not in context.earlier:
            raise PassError(
                "tune-moe needs the model that carve-moe carved.",
                "Run both in one recipe: carve-moe,tune-moe.",
            )
        with must_fit(context.device, self.name, "Lower batch or seqlen, or give own_text=0."):
            return _Tuning(self, program, context).run()


class _Tuning(Distiller):
    """One run of the pass."""

    def run(self) -> PassResult:
        self.note("the whole model", self.dense)
        self.note("carving", self.program)
        for function in self.program.functions.values():
            for node in function.nodes:
                if node.op == "top_gates":
                    node.attrs["surrogate"] = True
        self.distil()
        self.note("trained", self.program)
        parts = len(self.context.earlier["carve-moe"]["parts"])
        return PassResult(self.fold(), parts, parts, self.skipped, self.details)
