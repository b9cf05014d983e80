"""Width: feed-forward parts become shared neurons, and experts of which every token runs some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from graphopt.errors import PassError, UsageError
from graphopt.ir.blocks import Block, block_name
from graphopt.ir.expert_neurons import check_neurons_left, neuron_count
from graphopt.ir.feed_forward import FeedForward
from graphopt.ir.graph import Program
from graphopt.ir.mixture import Mixture, find_mixtures
from graphopt.ir.shapes import infer_program
from graphopt.pass_manager.contract import Context, Forecast, Pass, PassResult, register_pass
from graphopt.passes.carve_moe.mixtures import ExpertSplit
from graphopt.passes.carve_moe.parts import parts_of, width_of
from graphopt.passes.carve_moe.record import CarvedParts
from graphopt.passes.carve_moe.run import Carving
from graphopt.report.record import Record
from graphopt.support.devices import must_fit
from graphopt.support.per_device import PerDevice, on_device

CARVING_RUNS = 6.0
"""How often the calibration text runs through the model, in all, about."""


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
    biases are such that these are `active` on average: tokens that need more of them get more. At
    the end they are set anew on windows that were not learnt from, as many as those.

    With `layerwise_budget` every part has a number of shared groups of its own, which are at most
    `shared` on average: those get more by which the model loses more
    (`graphopt.calibration.layer_sensitivity`). A part that then runs all of its groups is left as
    it is.

    With `control` the model is also carved so that every token runs the same groups, as many as
    it runs here, and the pass compares the two on held-out text: where routing is no better, it
    says so. That takes about half of the pass's time again.

    Where `experts` do not divide the neurons, `pad` adds neurons of zeros.

    With `mixtures` the experts of mixtures are carved too, each by the tokens that are routed to
    it: `active=0` leaves every expert with its own `shared` groups of neurons, which a config says
    by a smaller number of them. Otherwise each has a router of its own, and neurons of groups that
    a token does not run are put to 0 (`graphopt.passes.carve_moe.mixtures`).

    Blocks are carved in order, each on what the carved blocks before it give, from `windows`
    windows of `seqlen` tokens: 32 of 2048 on a GPU and 16 of 512 on a CPU. A down projection is
    solved for as many features as it has neurons, of which there should be many times more tokens.

    Legality:

    1. A block adds one feed-forward part: a projection of an activation, or of its product with
       another projection, whose parts nothing else reads. Others are left as they are.
    2. The number of neurons is a multiple of `experts`, or `pad` is given.
    3. With `mixtures` a mixture is one that `prune-experts` reads, whose experts' neurons are made
       of columns of their first products alone.

    Options:
        shared: How many groups of neurons every token runs.
        active: How many of the other groups a token runs; 0 leaves no router.
        experts: Into how many groups neurons are divided.
        mode: How: fitted together with a router (fit), or as CMoE was published.
        rounds: How many turns the fit takes at most.
        reconstruct: Whether down projections are then solved for by least squares.
        threshold: Whether a token runs as many experts as it needs, active on average.
        layerwise_budget: Whether layers that matter more get more shared groups, shared on average.
        control: Whether the result is compared with the same groups for every token, which takes
            about half as long again.
        pad: Whether neurons of zeros are added where experts does not divide them.
        mixtures: Whether the experts of mixtures are carved too.
        k_activations: With mode=published: of how many tokens a neuron is indicated.
        cosine: With mode=published: whether inputs and rows are scaled to length 1 first.
        windows: How many windows of the calibration text are learnt from.
        seqlen: Tokens of a window.
    """

    name: ClassVar[str] = "carve-moe"
    record: ClassVar[type[Record]] = CarvedParts
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    shared: Annotated[int, Field(ge=0)] = 3
    active: Annotated[int, Field(ge=0)] = 3
    experts: Annotated[int, Field(ge=2)] = 8
    mode: Literal["fit", "published"] = "fit"
    rounds: Annotated[int, Field(ge=0)] = 12
    reconstruct: bool = True
    threshold: bool = False
    layerwise_budget: bool = False
    control: bool = True
    pad: bool = False
    mixtures: bool = False
    k_activations: Annotated[int, Field(ge=1)] = 10
    cosine: bool = False
    windows: Annotated[int, Field(ge=2)] | PerDevice[int] = PerDevice(cpu=16, gpu=32)
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
        if self.mixtures:
            self._check_mixture_options()
        if self.active and self.shared == self.experts:
            raise UsageError("All groups are shared, so none can be active.", "Lower shared.")
        if self.layerwise_budget and (not self.shared or self.shared + self.active == self.experts):
            what = "shared=0 has none" if not self.shared else "no part is to run fewer than all"
            raise UsageError(
                f"layerwise_budget=true allocates the shared groups of all parts, and {what}.",
                "Leave layerwise_budget out.",
            )

    def _check_mixture_options(self) -> None:
        for given, what in (
            (self.mode == "published", "mode=published"),
            (self.threshold, "threshold=true"),
            (self.layerwise_budget, "layerwise_budget=true"),
            (self.pad, "pad=true"),
        ):
            if given:
                raise UsageError(
                    f"{what} is for dense feed-forward parts, and mixtures=true carves the experts "
                    "of mixtures.",
                    "Leave one of them out.",
                )

    def check(self, program: Program) -> None:
        found = parts_of(program)
        mixtures = find_mixtures(program)
        carved = self.mixtures and self._check_mixtures(program, mixtures)
        if not carved and not any(isinstance(part, FeedForward) for _, part in found):
            if any(
                node.op == "top_k_gating" for f in program.functions.values() for node in f.nodes
            ):
                raise PassError(
                    f"{program.name} is carved into experts already.", "Leave carve-moe out."
                )
            reasons = sorted({part for _, part in found if isinstance(part, str)})
            can = not self.mixtures and any(isinstance(m, Mixture) for _, m in mixtures)
            raise PassError(
                f"{program.name} has no feed-forward part to carve"
                + (f": {'; '.join(reasons)}." if reasons else "."),
                "Carve each of its experts with mixtures=true." if can else "Leave carve-moe out.",
            )
        for block, part in found:
            if isinstance(part, FeedForward):
                self._check_width(block_name(program, block), width_of(program, block, part))

    def forecast(self, program: Program, device: torch.device) -> Forecast:
        widths = Counter(
            width_of(program, block, part)
            for block, part in parts_of(program)
            if isinstance(part, FeedForward)
        )
        tokens = on_device(self.windows, device) * on_device(self.seqlen, device)
        times = CARVING_RUNS * (2.0 if self.control else 1.0)
        memory = 4 * max((weight.numel for weight in program.used_weights()), default=0)
        if self.mixtures:
            return Forecast("carves the experts of mixtures", tokens=times * tokens, memory=memory)
        divided = ", ".join(
            f"{count} feed-forward parts of {width} neurons" for width, count in widths.items()
        )
        size = ", ".join(str(-(-width // self.experts)) for width in widths)
        routed = self.experts - self.shared
        what = (
            f"divides {divided} into {self.experts} groups of {size}: {self.shared} shared, and "
            f"{routed} of which a token runs {self.active}"
            if self.active
            else f"leaves {self.shared} of {self.experts} groups of {size} neurons in {divided}"
        )
        return Forecast(what, tokens=times * tokens, memory=memory)

    def expert_split(self, *, reconstruct: bool) -> ExpertSplit:
        """Return how the neurons of each expert of a mixture are divided."""
        return ExpertSplit(self.shared, self.active, self.experts, self.rounds, reconstruct)

    def _check_mixtures(self, program: Program, found: list[tuple[Block, Mixture | str]]) -> bool:
        """Check the mixtures of a program; return whether there is one whose experts are carved."""
        kinds, _ = infer_program(program)
        read = [(block, mixture) for block, mixture in found if isinstance(mixture, Mixture)]
        for block, mixture in read:
            where, types = block_name(program, block), kinds[block.position]
            call = program.calls[block.position]
            neurons = neuron_count(types, mixture)
            self._check_width(f"An expert of {where}", neurons)
            try:
                check_neurons_left(
                    program.function_of(call), call, types, mixture,
                    self.expert_split(reconstruct=False).left_of(neurons),
                )  # fmt: skip
            except ValueError as error:
                raise PassError(f"Experts of {where} cannot be carved: {error}.") from error
        return bool(read)

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

    def milder(self, recipe: Sequence[str]) -> str:
        more = "let a token run more neurons (carve-moe{active=} or {shared=})"
        return more if "tune-moe" in recipe else f"{more}, or add tune-moe behind it"

    def run(self, program: Program, context: Context) -> PassResult:
        remedy = "Lower windows or seqlen, or take --device cpu."
        with must_fit(context.device, "carve-moe", remedy):
            return Carving(self, program, context).run()
