"""One run of `flatquant`: transforms, block after block, then the whole model, then codes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graphopt.calibration.affine_factors import (
    FactorMaker,
    Transform,
    check_condition,
    condition,
    conditions,
)
from graphopt.calibration.affine_plan import AffinePlan, FunctionPlan, plan_transforms
from graphopt.calibration.text import calibration_windows, pick, window_length
from graphopt.execute.block_runner import BlockRunner, Parametrisation
from graphopt.execute.interpreter import resident
from graphopt.ir.blocks import block_name, find_blocks, with_own_functions
from graphopt.ir.graph import Call, Program
from graphopt.ir.weights import Array
from graphopt.pass_manager.contract import Context, PassResult, Skip, Statement
from graphopt.pass_manager.numbering import same_outputs
from graphopt.passes.flatquant.clips import MOST_CLIP, search_clips
from graphopt.passes.flatquant.packing import encodings_of, pack_weights
from graphopt.passes.flatquant.record import FlatQuantised, TrainedBlock
from graphopt.passes.flatquant.statement import RoundedBlocks
from graphopt.passes.flatquant.structure import (
    Bits,
    RoundedFunction,
    base_values,
    insert_roundings,
    trained_sites,
    transform,
)
from graphopt.passes.quantize.quantize import Quantize
from graphopt.support.per_device import on_device
from graphopt.support.ranks import here
from graphopt.training.affine import BlockTransforms, Rounding
from graphopt.training.distil import Distiller
from graphopt.training.distillation_data import DistillationData, HiddenStateCache
from graphopt.training.held_out import held_out_loss
from graphopt.training.kept_files import keep_state, kept_state
from graphopt.training.losses import HiddenStateObjective, relative_mse
from graphopt.training.memory import StepSizes
from graphopt.training.parametrisations import FullParametrisation, assign, weight_scale
from graphopt.training.schedule import TrainingResult
from graphopt.training.step_memory import StepMemory
from graphopt.training.tuner import Tuner

if TYPE_CHECKING:
    from graphopt.passes.flatquant.flatquant import FlatQuant

RATE = 5e-3
"""The highest learning rate of transforms and scales; clips have ten times as much."""

LARGE = 0.2
"""The share of a device's free memory that both models' weights may take in it."""

WEIGHT_RATE = 0.2
"""In distillation, the factor of the usual learning rate: weights begin where blocks are right."""


class RoundedParametrisation(Parametrisation):
    """A matrix that is trained while it is rounded: a rounding has the gradient of the identity."""

    def __init__(self, value: Tensor, rounding: Rounding, rate: float) -> None:
        super().__init__()
        self.value, self.rounding, self.rate = nn.Parameter(value.clone()), rounding, rate

    def forward(self) -> Tensor:
        return self.rounding.rounded(self.value)

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        return [(self.rate, [self.value])]


class FlatQuantising(Distiller):
    """One run of the pass."""

    options: FlatQuant
    record: FlatQuantised
    tells = FlatQuantised
    remedy = "Give a lower seqlen, distil=0, which trains one block at a time, or --device cpu."

    def __init__(self, options: FlatQuant, program: Program, context: Context) -> None:
        self.source = program = with_own_functions(program)
        started = here().clock()
        self.bits = Bits(options.w, options.a, options.kv, options.group)
        transformed = program.copy()
        self.plan = self._plan(options, transformed, context)
        transform(transformed, self.plan)
        self.rounded, left = insert_roundings(
            transformed, self.bits, per_linear=options.method == "published"
        )
        self.matrices: dict[str, RoundedParametrisation] = {}
        super().__init__(options, transformed, context, rate=options.rate or RATE)
        self.started = started
        count = on_device(options.windows, self.device)
        held = len(self.checked)
        if count and len(self.windows) + held > count:
            self.windows = pick(self.windows, max(count - held, 1), context.seed)
        if not self.done:
            told = [Skip(where, reason) for where, reason in (*self.plan.left, *left)]
            self.skipped += [skip for skip in told if skip not in self.skipped]
        self.record.kind, self.record.bits = options.kind, (options.w, options.a, options.kv)

    def home_of(self, program: Program) -> torch.device:
        """Keep large models on the host: a block at a time is on the device then."""
        size = sum(2 * 4 * weight.numel for weight in program.used_weights())
        return self.home_for(size, LARGE)

    def blocks_at_once(self) -> int:
        whole = self.options.distil > 0 and self.options.steps != 0
        return super().blocks_at_once() if whole and self.options.method != "published" else 1

    @property
    def by_logits(self) -> bool:
        return self.blocks_at_once() > 1

    @property
    def divisible(self) -> bool:
        return self.options.method != "published"

    @property
    def distils(self) -> bool:
        """Whether all weights are trained at the end."""
        options = self.options
        return options.method != "published" and options.distil > 0 and self.schedule.steps != 0

    @property
    def _learns(self) -> bool:
        """Whether anything of blocks is trained."""
        return self.schedule.steps != 0 and (self.options.kind == "kronecker" or self.options.clip)

    @staticmethod
    def _plan(options: FlatQuant, program: Program, context: Context) -> AffinePlan:
        kind: Transform = options.start if options.kind == "kronecker" else options.kind
        if options.method == "published":
            kind = "random"
        generator = torch.Generator().manual_seed(context.seed)
        scaled = options.scale and options.kind in ("kronecker", "closed", "scale")
        inputs = options.a < 16 or options.w < 16
        # Stacks of experts' matrices are not packed, and a transform is for what is rounded.
        maker = FactorMaker(kind, program, generator, scaled, inputs, experts=False)
        windows = None
        if maker.needs_text:
            length = window_length(program, options.seqlen, context.device)
            windows = calibration_windows(program, context, length)
            windows = pick(windows, on_device(options.windows, context.device), context.seed)
        return plan_transforms(
            program, maker, heads=options.heads, keys=options.keys and options.kv < 16,
            blocks_alone=True, windows=windows, device=context.device, progress=context.progress,
        )  # fmt: skip

    def run(self) -> PassResult:
        self.clock("transforms", self.started)
        if "blocks" not in self.done:
            self.note("the whole model", self.dense)
            self._train_blocks()
            self.checkpoint("blocks")
        self.note("blocks", self._with_rounded_weights(self.program))
        left = self.left()
        if self.distils and (left is None or left > 0):
            self._distil()
        started = here().clock()
        result = self.fold()
        packed, packing = self._packed(result)
        statement = self._statement(result, packing)
        self.clock("codes", started)
        self.record.seconds["all"] = here().clock() - self.started
        changed = len(self.record.blocks)
        return PassResult(packed, changed, changed, self.skipped, self.record, statement)

    # Block by block

    def _train_blocks(self) -> None:
        started = here().clock()
        assert self.context.dense is not None
        same = same_outputs(self.context.dense, self.source)
        teacher = self.dense if same else resident(self.source, torch.float32, self.home)
        ids = torch.cat([self.windows, self.checked])
        theirs, ours = find_blocks(teacher), find_blocks(self.program)
        entry: HiddenStateCache | None = None
        student_entry: HiddenStateCache | None = None
        for index, (old, new) in enumerate(zip(theirs, ours, strict=True)):
            runner = BlockRunner(teacher, old.position, old.position + 1, {}, self.device)
            targets = HiddenStateCache(runner, ids, entry, self.tokens_ahead)
            data = DistillationData(ids, targets, student_entry, held_out=len(self.checked))
            group = self._group(new.position)
            student = BlockRunner(
                self.program, new.position, new.position + 1, {}, self.device, [group]
            )
            what = f"block {index + 1} of {len(ours)}"
            self.context.progress("training blocks", index, len(ours))
            result = self._restored(what, group)
            if result is None:
                self._begin_clips(student, group, data)
                result = self._tune_block(student, data, what, len(ours) - index)
                self._keep(what, group, result)
            self._note_block(index, new.position, group, result)
            for name, value in group.folded().items():
                assign(self.program, name, value.to(self.home))
            # With each cache goes the one that it was made of.
            targets.complete()
            entry = student_entry = targets
            if self.options.inputs == "rounded":
                student_entry = HiddenStateCache(student, ids, data.entry, self.tokens_ahead)
                student_entry.complete()
        self.context.progress("training blocks", len(ours), len(ours))
        idle = sum(block.steps == 0 for block in self.record.blocks)
        if idle and self._learns:
            reason = (
                f"NO STEP was made in {idle} of {len(ours)} blocks: give more seconds, or a "
                "shorter seqlen or batch"
            )
            self.skipped.append(Skip("training", reason))
        self.clock("training blocks", started)

    def _group(self, position: int) -> BlockTransforms:
        """Return what is trained of a block."""
        call = self.program.calls[position]
        planned, number = self._planned(position)
        rounded = self.rounded.get(call.function, RoundedFunction())
        sites, keys = ([], []) if planned is None else trained_sites(self.program, planned, number)
        base = base_values(self.source, self.source.calls[position], sites, rounded, self.device)
        clips = {slot: torch.full((1,), MOST_CLIP) for slot in rounded.clips}
        return BlockTransforms(
            call.weights, base, sites, keys, rounded.linears, clips,
            learn=self._learns and self.options.kind == "kronecker",
            learn_clips=self._learns and self.options.clip,
        ).to(self.device)  # fmt: skip

    def _planned(self, position: int) -> tuple[FunctionPlan | None, int]:
        """Return the plan of a block's function, with the number of the block's call in it."""
        path = self.program.calls[position].path
        for part in self.plan.functions:
            for number, call in enumerate(part.calls):
                if call.path == path and call.function == self.program.calls[position].function:
                    return part, number
        return None, 0

    @torch.no_grad()
    def _begin_clips(
        self, student: BlockRunner, group: BlockTransforms, data: DistillationData
    ) -> None:
        if self.options.method == "published":
            return
        if self.options.clip:
            search_clips(student, group, data)
            return
        for parameter in group.clips:
            parameter.fill_(torch.inf)

    def _tune_block(
        self, student: BlockRunner, data: DistillationData, what: str, blocks_left: int
    ) -> TrainingResult:
        published = self.options.method == "published"
        loss = mean_square if published else relative_mse
        objective = HiddenStateObjective(loss, additive=not published)
        schedule = replace(
            self.schedule, rate=self.options.rate or RATE,
            weight_decay=0.01 if published else 0.0, reduce_on_plateau=False,
            memory=self._block_memory,
        )  # fmt: skip
        if not student.groups[0].rates():
            # Nothing is trained: the error is measured alone.
            loss_now = held_out_loss(student, data, objective, schedule.batch)
            return TrainingResult(checks=[(0, loss_now)])
        if published and self.options.seconds is None:
            epochs = 15 * max(1, len(self.windows) // schedule.batch)
            schedule = replace(schedule, steps=self.options.steps or epochs, seconds=None)
        elif schedule.seconds is not None:
            # The last part of the seconds is for the whole model.
            left = self.left() or 0.0
            reserve = self.options.distil * schedule.seconds if self.distils else 0.0
            schedule = replace(schedule, seconds=max(left - reserve, 0.0) / blocks_left)
        tuner = Tuner(
            student, data, objective, schedule,
            seed=self.context.seed, progress=self.context.progress, what=what,
        )  # fmt: skip
        return tuner.run()

    @functools.cached_property
    def _block_memory(self) -> StepMemory:
        """How a step of one block is kept small: it needs less than one of all of them."""
        if self.schedule.memory == StepMemory():
            return self.schedule.memory
        sizes = StepSizes.of(
            self.program, self.dense, self.options.batch, torch.cat([self.windows, self.checked]),
            self.context, 1, by_logits=False, divisible=self.divisible, streams=self.streams,
            remedy=self.remedy,
        )  # fmt: skip
        return sizes.step.memory

    def _note_block(
        self, index: int, position: int, group: BlockTransforms, result: TrainingResult
    ) -> None:
        where = block_name(self.program, find_blocks(self.program)[index])
        numbers: dict[str, float] = {}
        factors, matrices = group.trained_factors()
        for site, made in zip(group.sites, factors, strict=True):
            stem = site.readers[0][0].removesuffix(".weight")
            for role, number in conditions(made).items():
                numbers[f"{stem}.{role}"] = number
            for part in (made.left, made.right, made.values, made.scale):
                if part is not None:
                    check_condition(part, f"{where}.{stem}")
        for key, matrix in zip(group.keys, matrices, strict=True):
            numbers[key.keys] = condition(matrix)
            check_condition(matrix, f"{where}.{key.keys}")
        clips = {
            slot: float(torch.sigmoid(value.detach()).mean())
            for slot, value in zip(group.clip_slots, group.clips, strict=True)
        }
        losses = [value for _, value in result.checks]
        self.record.blocks.append(
            TrainedBlock(
                where=where,
                before=losses[0] if losses else None,
                after=min(losses, default=None),
                steps=result.steps,
                condition={**numbers},
                clips={**clips},
            )
        )
        if result.stopped:
            self.skipped.append(Skip(where, f"stopped early: {result.stopped}"))

    # Going on after an interruption

    def _keep(self, what: str, group: BlockTransforms, result: TrainingResult) -> None:
        state = {name: value.cpu() for name, value in group.state_dict().items()}
        spent = here().clock() - self.started
        kept = {"state": state, "checks": result.checks, "steps": result.steps, "spent": spent}
        keep_state(self._kept_file(what), kept)

    def _restored(self, what: str, group: BlockTransforms) -> TrainingResult | None:
        kept = kept_state(self._kept_file(what))
        if kept is None:
            return None
        group.load_state_dict(kept["state"])
        now = here().clock() - self.started
        self.started -= max(kept["spent"] - now, 0.0)
        checks = [(int(step), float(loss)) for step, loss in kept["checks"]]
        return TrainingResult(steps=int(kept["steps"]), checks=checks)

    # The whole model

    def _distil(self) -> None:
        rate = self.usual_rate(self.schedule.batch * self.seqlen) * WEIGHT_RATE
        self.schedule = replace(self.schedule, rate=rate, reduce_on_plateau=True)
        self.distil(self.logit_data())
        for name, matrix in self.matrices.items():
            # As it was learnt: values of nearest codes would leave GPTQ nothing to choose from.
            assign(self.program, name, matrix.value.to(self.home))
        self.matrices.clear()
        self.note("distilled", self._with_rounded_weights(self.program))

    def parametrisations(self, program: Program, calls: list[Call]) -> dict[str, Parametrisation]:
        parametrisations = super().parametrisations(program, calls)
        for call in calls:
            rounded = self.rounded.get(call.function, RoundedFunction())
            for slot, rounding in rounded.linears.items():
                value = program.weights[call.weights[slot]].load(torch.float32).to(self.device)
                matrix = RoundedParametrisation(value, rounding, weight_scale(value))
                parametrisations[call.weights[slot]] = self.matrices[call.weights[slot]] = matrix
            for slot in rounded.clips:
                value = program.weights[call.weights[slot]].load(torch.float32).to(self.device)
                parametrisations[call.weights[slot]] = FullParametrisation(value, 1.0)
        return parametrisations

    # Codes

    def _with_rounded_weights(self, program: Program) -> Program:
        """Return a program with the weights that codes stand for, on the device."""
        result = program.copy()
        for name, rounding in self._rounded_weights(program):
            weight = result.weights[name]
            value = rounding.rounded(weight.load(torch.float32).to(self.device)).to(self.home)
            result.weights.replace(weight.with_producer(Array(value)))
        return result

    def _rounded_weights(self, program: Program) -> Iterable[tuple[str, Rounding]]:
        for call in program.calls:
            rounded = self.rounded.get(call.function, RoundedFunction())
            for slot, rounding in rounded.linears.items():
                yield call.weights[slot], rounding

    def _packed(self, program: Program) -> tuple[Program, Statement | None]:
        """Return the program with codes in the place of the weights that are rounded.

        Returns:
            The program, and what holds of it against the one given; None where no weight is
            rounded.
        """
        options = self.options
        if self.bits.w >= 16:
            return program, None
        learnt = options.clip and self._learns
        quantize = Quantize(
            w=self.bits.w, group=self.bits.group, method=options.rounding,
            clip=options.clip and not learnt, windows=options.windows, seqlen=options.seqlen,
        )  # fmt: skip
        result = pack_weights(program, quantize, self.context)
        self.skipped += [skip for skip in result.skipped if skip not in self.skipped]
        return result.program, result.statement

    def _statement(self, folded: Program, packing: Statement | None) -> RoundedBlocks:
        """Return what holds of the result.

        Args:
            folded: The program as it was trained.
            packing: What holds of the result against it.
        """
        return RoundedBlocks(
            encodings_of(folded, self._rounded_weights(folded)),
            frozenset(
                call.weights[slot]
                for call in folded.calls
                for slot in self.rounded.get(call.function, RoundedFunction()).readers
            ),
            self.bits.a if self.bits.a < 16 else None,
            self.bits.kv if self.bits.kv < 16 else None,
            folded,
            packing,
        )


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared error divided by its own value: the gradient is that of its logarithm.

    Source: the published code of FlatQuant, commit 9d88ffc.
    """
    error = (output.float() - target.float()).square().mean()
    return error / error.detach().clamp(min=1e-30) if error.requires_grad else error
