"""Training after `carve-moe`: experts, shared neurons and the router learn from the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pydantic
import torch
from pydantic import Field

from graphopt.calibration.expert_load import expert_loads
from graphopt.calibration.routing_thresholds import calibrate_thresholds
from graphopt.errors import PassError
from graphopt.execute.block_runner import Parametrisation
from graphopt.ir.feed_forward import add_gate_operands, routed_gates
from graphopt.ir.graph import Call, Program
from graphopt.pass_manager.contract import Context, Forecast, Pass, PassResult, register_pass
from graphopt.pass_manager.statements import ChangedBlocks
from graphopt.passes.carve_moe.record import CarvedParts
from graphopt.report.record import Record
from graphopt.support.devices import must_fit
from graphopt.support.ranks import here
from graphopt.training.distil import Distiller
from graphopt.training.forecast import forecast_training
from graphopt.training.options import TrainingOptions
from graphopt.training.parametrisations import FullParametrisation, LoadBalanceBias
from graphopt.training.record import TrainingRecord

SCALE_RATE = 0.4
"""The factor of the learning rate for gate scales: with the usual rate it is CMoE's 1e-3."""

THRESHOLD_WINDOWS = 16
"""Windows that thresholds are set on at the end, at most; nothing is learnt from them."""


class ExpertLoads(pydantic.BaseModel):
    """Shares of held-out tokens that run each expert of a part, before and after training."""

    model_config = pydantic.ConfigDict(extra="forbid")

    where: str
    before: list[float]
    after: list[float]


class TunedMoe(TrainingRecord):
    """What training a carved model gave, with the loads of its experts, a part each."""

    loads: list[ExpertLoads] = Field(default_factory=list)

    def line(self) -> str:
        line, values = super().line(), [step.value for step in self.perplexity]
        if len(values) == 3 and None not in values and values[2] >= values[1]:  # type: ignore[operator]
            line += "; TRAINING DOES NOT HELP: the carved model is no worse"
        return line

    def own_sentences(self) -> list[str]:
        return super().own_sentences() + [
            sentence
            for when in ("before", "after")
            if (sentence := _load_sentence(when, [getattr(load, when) for load in self.loads]))
        ]


def _load_sentence(when: str, loads: list[list[float]]) -> str:
    """Return how many experts tokens run, and how evenly they are used."""
    known = [load for load in loads if sum(load) > 0]
    if not known:
        return ""
    most = sum(max(load) / (sum(load) / len(load)) for load in known) / len(known)
    active = sum(map(sum, known)) / len(known)
    return (
        f"{when.capitalize()} training a token runs {active:.2f} experts of a part, and the most "
        f"used one runs {most:.2f} times as often as the mean."
    )


@register_pass
@dataclass
class TuneMoe(TrainingOptions, Pass):
    """Train a carved model on the dense model's next-token distributions.

    All weights of the blocks are trained: of experts, of what is shared, of attention and of the
    router. With `gate` a chosen expert's gate is 1 and its probability times a scale that is
    trained from 0 (CMoE, arXiv 2502.04416, section 4.4): by it the router learns, since a choice
    of experts has no gradient. With `surrogate` the router also has that of a soft choice in its
    place (`graphopt.ir.ops.experts.TopKGating`), which led routers astray that `carve-moe` had
    fitted. `balance` is how far a bias of every expert's probability moves in a step towards equal
    loads; it takes part in choices alone. CMoE has 1e-3; equal loads cost quality, so that none is
    the default. Thresholds always have such a bias, which follows the threshold that gives as many
    experts as they are to have on average; at the end they are set anew on windows that were not
    learnt from.

    Training lasts `seconds` or `steps`, whichever is given (150 seconds if neither). A step
    takes `batch` windows of `seqlen` tokens; by default 4 of 2048 on a GPU and 2 of 256 on a
    CPU. `generated_windows` and `train=low-rank` with its `rank` are as for `fuse-blocks`.

    Legality:

    1. The recipe has `carve-moe` before it.
    2. The calibration text has a window for training and one for checks.

    Options:
        surrogate: Whether the router learns by the gradient of a soft choice, too.
        gate: Whether the scale is trained, from 0, by which a chosen expert's probability is added
            to its gate of 1.
        balance: How far a step moves each expert's bias towards equal loads; 0 for no such bias.
    """

    name: ClassVar[str] = "tune-moe"
    record: ClassVar[type[Record]] = TunedMoe
    exact: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("carve-moe",)

    surrogate: bool = False
    gate: bool = True
    balance: Annotated[float, Field(ge=0)] = 0.0

    def milder(self, recipe: Sequence[str]) -> str:
        return "train for longer (tune-moe{seconds=}) and on text of your own (--calib)"

    def forecast(self, program: Program, device: torch.device) -> Forecast:
        return forecast_training(self, program, device, "trains experts, shared neurons and router")

    def run(self, program: Program, context: Context) -> PassResult:
        if context.dense is None or context.record(CarvedParts) is None:
            raise PassError(
                "tune-moe needs the model that carve-moe carved.",
                "Run both in one recipe: carve-moe,tune-moe.",
            )
        with must_fit(
            context.device, self.name, "Lower batch or seqlen, or give generated_windows=0."
        ):
            return _Tuning(self, program, context).run()


class _Tuning(Distiller):
    """One run of the pass."""

    options: TuneMoe
    record: TunedMoe
    tells = TunedMoe

    def __init__(self, options: TuneMoe, program: Program, context: Context) -> None:
        self.carved = program
        program = program.copy()
        gates = [node for f in program.functions.values() for node in routed_gates(f)]
        self.thresholds = any(node.attrs.get("mean_active_experts") for node in gates)
        self.balances = options.balance > 0 or self.thresholds
        self.gates = add_gate_operands(
            program, selection_bias=self.balances, gate_scale=options.gate
        )
        super().__init__(options, program, context)
        self.unseen = self.checked
        self._closing_seconds = 0.0
        if self.thresholds and len(self.windows) > 1:
            held = max(1, min(THRESHOLD_WINDOWS, len(self.windows) // 8))
            self.windows, self.unseen = self.windows[:-held], self.windows[-held:]

    def run(self) -> PassResult:
        options = self.options
        self.note("the whole model", self.dense)
        self.note("carving", self.program)
        started = here().clock()
        before = self._loads()
        walk = (here().clock() - started) / len(self.checked)
        # The same is measured at the end, and thresholds are set in such a walk.
        self._closing_seconds = walk * (len(self.checked) + self.thresholds * len(self.unseen))
        for function in self.program.functions.values():
            routed = routed_gates(function)
            for node in function.nodes:
                if node.op == "top_k_gating":
                    balanced = self.balances and node in routed
                    node.attrs |= {"surrogate": options.surrogate, "balance": balanced}
        self.distil(self.logit_data())
        if self.thresholds and self.changed:
            started = here().clock()
            calibrate_thresholds(self.program, self.unseen, self.device)
            self.clock("thresholds", started)
        self.note("trained", self.program)
        self.record.loads = [
            ExpertLoads(where=where, before=load, after=after)
            for (where, load), (_, after) in zip(before, self._loads(), strict=True)
        ]
        carved = self.context.record(CarvedParts)
        assert carved is not None
        parts = len(carved.parts)
        self.say_if_useless()
        if not self.changed:
            return PassResult(self.carved, parts, 0, self.skipped, self.record, ChangedBlocks())
        return PassResult(self.fold(), parts, parts, self.skipped, self.record, ChangedBlocks())

    def left(self) -> float | None:
        left = super().left()
        return None if left is None else max(left - self._closing_seconds, 0.0)

    def parametrisations(self, program: Program, calls: list[Call]) -> dict[str, Parametrisation]:
        parametrisations = super().parametrisations(program, calls)
        for kind, names in self.gates.items():
            for name in names:
                value = program.weights[name].load().to(self.device)
                parametrisations[name] = (
                    LoadBalanceBias(value, None if self.thresholds else self.options.balance)
                    if kind == "selection_bias"
                    else FullParametrisation(value, SCALE_RATE)
                )
        return parametrisations

    def _loads(self) -> list[tuple[str, list[float]]]:
        return expert_loads(self.program, self.checked, self.device)
