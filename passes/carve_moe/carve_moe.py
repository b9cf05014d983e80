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
    """Divide the neurons of every feed-forward part into `experts` groups of equal size.

    `shared` of the groups are shared experts, which every token runs; the others are routed
    experts, of which a token runs the `active` ones with the highest router logits. A group is
    rows and columns of the projections. `active=0` leaves the groups that matter most on average,
    and no router.

    With `mode=fit` neurons and a linear router are fitted to each other in up to `rounds` turns
    (`graphopt.passes.carve_moe.division.divide_by_fit`). `mode=published` is CMoE as published
    (arXiv 2502.04416): neurons are clustered by their activation indicators, which are 1 for the
    tokens in which a neuron is among the `k_activations` of largest magnitude, and one neuron of
    each expert is its router. With `cosine` the indicators are, as in CMoE's code, those of
    activations of inputs and rows of the projections scaled to length 1.

    With `reconstruct` (and `mode=fit`) the down projections are then reconstructed by least squares
    with L2 regularisation towards the weights as they are, so that the residual stream behind
    each part is nearest to what it was before carving. The ridge strength is the one that is best
    on windows that the fit does not see.

    With `threshold` a token runs every expert whose router logit is above 0, and the router's
    biases are such that these are `active` on average: tokens that need more of them get more.

    With `layerwise_budget` every part has a number of shared groups of its own, which are at most
    `shared` on average: those get more by which the model loses more
    (`graphopt.calibration.layer_sensitivity`). A part that then runs all of its groups is left as
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
    mode: Literal["fit", "published"] = "fit"
    rounds: Annotated[int, Field(ge=0)] = 6
    reconstruct: bool = True
    threshold: bool = False
    layerwise_budget: bool = False
    pad: bool = False
    k_activations: Annotated[int, Field(ge=1)] = 10
    cosine: bool = False
    windows: Annotated[int, Field(ge=2)] = 8
    seqlen: Annotated[int, Field(ge=2)] | PerDevice[int] = PerDevice(cpu=512, gpu=2048)

    def check_options(self) -> None:
        if self.shared + self.active > self.experts or self.shared + self.active == 0:
            raise UsageError(
                f"{self.shared} shared and {self.active} active groups are not 1 to "
                f"{self.experts}, which is how many there are.",
                "Lower shared or active, or raise experts.",
            )
        if self.pad and self.mode == "published":
            raise UsageError(
                "mode=published takes the neuron that is among the largest activations least often "
                "as an expert's router, which would be one of the zeros that pad=true adds.",
                "Use mode=fit, or experts that divide the neurons.",
            )
        if self.cosine and self.mode != "published":
            raise UsageError(
                f"cosine=true says which activations are the largest, and mode={self.mode} goes by "
                "the energy of neurons.",
                "Leave cosine out, or take mode=published.",
            )
        if self.threshold and (self.mode == "published" or not self.active):
            what = "mode=published" if self.mode == "published" else "active=0"
            raise UsageError(
                f"threshold=true goes by the logits of a fitted router, and {what} has none.",
                "Leave threshold out.",
            )
        if self.active and self.shared == self.experts:
            raise UsageError("All groups are shared, so none can be active.", "Lower shared.")
        if self.layerwise_budget and (not self.shared or self.shared + self.active == self.experts):
            what = "shared=0 has none" if not self.shared else "no part is to run fewer than all"
            raise UsageError(
                f"layerwise_budget=true allocates the shared groups of all parts, and {what}.",
                "Leave layerwise_budget out.",
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
                f"{where} has {width} neurons, which {self.experts} groups do not divide.",
                ("" if nearest is None else f"Take experts={nearest}, or ")
                + ("add" if nearest else "Add")
                + " neurons of zeros with pad=true.",
            )
        if width <= self.experts:
            raise PassError(
                f"{where} has {width} neurons, and {self.experts} groups need more than one each.",
                "Lower experts.",
            )
        if self.mode == "published" and self.k_activations > width:
            raise PassError(
                f"{where} has {width} neurons, so that {self.k_activations} cannot be the largest "
                "of a token.",
                f"Give k_activations={width} or less.",
            )

    def run(self, program: Program, context: Context) -> PassResult:
        remedy = "Lower windows or seqlen, or take --device cpu."
        with must_fit(context.device, "carve-moe", remedy):
            return Carving(self, program, context).run()
