"""Width: feed-forward parts become shared neurons, and experts of which every token runs some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graphopt.errors import PassError, UsageError
from graphopt.ir.blocks import block_name
from graphopt.ir.feed_forward import FeedForward
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Context, Pass, PassResult, register_pass
from graphopt.passes.carve_moe.parts import parts_of, width_of
from graphopt.passes.carve_moe.record import CarvedParts
from graphopt.passes.carve_moe.run import Carving
from graphopt.report.record import Record
from graphopt.support.devices import must_fit
from graphopt.support.per_device import PerDevice


@register_pass
@dataclass
class CarveMoe(Pass):
    """Divide the neurons of every feed-forward part into `experts` equal pieces.

    `shared` of the pieces are run by every token, and of the others the `active` ones with the
    highest scores of a router. Pieces are rows and columns of the projections. `active=0` leaves
    the pieces that matter most on average, and no router.

    With `mode=fit` neurons and a linear router are fitted to each other in up to `rounds` turns
    (`graphopt.passes.carve_moe.division.divide_by_fit`). `mode=faithful` is CMoE as published
    (arXiv 2502.04416): clusters of neurons that are among the `marks` largest of the same tokens,
    and as router one neuron of each. With `normalised` it marks as CMoE's code does, by activations
    of inputs and rows of the projections scaled to length 1.

    With `refit` (and `mode=fit`) the down projections are then solved for anew, by least squares
    that pull towards the weights as they are, so that the stream behind each part is nearest to
    what it was before carving. The pull is the one that is best on windows that the fit does not
    see.

    With `threshold` a token runs every expert whose score is above 0, and the router's constants
    are such that these are `active` on average: tokens that need more of them get more.

    With `by_layer` every part has a number of shared pieces of its own, which are at most `shared`
    on average: those get more by which the model loses more
    (`graphopt.calibration.layer_sensitivity`). A part that then runs all of its pieces is left as
    it is.

    Where `experts` do not divide the neurons, `pad` adds neurons of zeros.

    Blocks are carved in order, each on what the carved blocks before it give, from `windows`
    windows of `seqlen` tokens: 8 of 2048 on a GPU and 8 of 512 on a CPU.

    Legality:

    1. A block adds one feed-forward part: a projection of an activation, or of its product with
       another projection, whose parts nothing else reads. Others are left as they are.
    2. The number of neurons is a multiple of `experts`, or `pad` is given.
    """

    name: ClassVar[str] = "carve-moe"
    record: ClassVar[type[Record]] = CarvedParts
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    shared: Annotated[int, Field(ge=0)] = 3
    active: Annotated[int, Field(ge=0)] = 3
    experts: Annotated[int, Field(ge=2)] = 8
    mode: Literal["fit", "faithful"] = "fit"
    rounds: Annotated[int, Field(ge=0)] = 6
    refit: bool = True
    threshold: bool = False
    by_layer: bool = False
    pad: bool = False
    marks: Annotated[int, Field(ge=1)] = 10
    normalised: bool = False
    windows: Annotated[int, Field(ge=2)] = 8
    seqlen: Annotated[int, Field(ge=2)] | PerDevice[int] = PerDevice(cpu=512, gpu=2048)

    def check_options(self) -> None:
        if self.shared + self.active > self.experts or self.shared + self.active == 0:
            raise UsageError(
                f"{self.shared} shared and {self.active} active pieces are not 1 to "
                f"{self.experts}, which is how many there are.",
                "Lower shared or active, or raise experts.",
            )
        if self.pad and self.mode == "faithful":
            raise UsageError(
                "mode=faithful takes the neuron that is marked least as an expert's router, which "
                "would be one of the zeros that pad=true adds.",
                "Use mode=fit, or experts that divide the neurons.",
            )
        if self.normalised and self.mode != "faithful":
            raise UsageError(
                f"normalised=true is a way of marking neurons, which mode={self.mode} does by "
                "their energy.",
                "Leave normalised out, or take mode=faithful.",
            )
        if self.threshold and (self.mode == "faithful" or not self.active):
            what = "mode=faithful" if self.mode == "faithful" else "active=0"
            raise UsageError(
                f"threshold=true goes by scores of a fitted router, and {what} has none.",
                "Leave threshold out.",
            )
        if self.active and self.shared == self.experts:
            raise UsageError("All pieces are shared, so none can be active.", "Lower shared.")
        if self.by_layer and (not self.shared or self.shared + self.active == self.experts):
            what = "shared=0 has none" if not self.shared else "no part is to run fewer than all"
            raise UsageError(
                f"by_layer=true shares out the shared pieces of all parts, and {what}.",
                "Leave by_layer out.",
            )

    def check(self, program: Program) -> None:
        found = parts_of(program)
        if not any(isinstance(part, FeedForward) for _, part in found):
            if any(
                node.op == "top_k_gating" for f in program.functions.values() for node in f.nodes
            ):
                raise PassError(
                    f"{program.name} is carved into experts already.", "Leave carve-moe out."
                )
            reasons = sorted({part for _, part in found if isinstance(part, str)})
            raise PassError(
                f"{program.name} has no feed-forward part to carve"
                + (f": {'; '.join(reasons)}." if reasons else "."),
                "A model of experts already cannot be carved; leave carve-moe out.",
            )
        for block, part in found:
            if isinstance(part, FeedForward):
                self._check_width(block_name(program, block), width_of(program, block, part))

    def _check_width(self, where: str, width: int) -> None:
        if width % self.experts and not self.pad:
            fitting = [n for n in range(2, 65) if width % n == 0]
            nearest = min(fitting, key=lambda n: abs(n - self.experts), default=None)
            raise PassError(
                f"{where} has {width} neurons, which {self.experts} pieces do not divide.",
                ("" if nearest is None else f"Take experts={nearest}, or ")
                + ("add" if nearest else "Add")
                + " neurons of zeros with pad=true.",
            )
        if width <= self.experts:
            raise PassError(
                f"{where} has {width} neurons, and {self.experts} pieces need more than one each.",
                "Lower experts.",
            )
        if self.mode == "faithful" and self.marks > width:
            raise PassError(
                f"{where} has {width} neurons, of which {self.marks} cannot be marked.",
                f"Give marks={width} or less.",
            )

    def run(self, program: Program, context: Context) -> PassResult:
        remedy = "Lower windows or seqlen, or take --device cpu."
        with must_fit(context.device, "carve-moe", remedy):
            return Carving(self, program, context).run()
