"""How many windows a training step takes: predicted for a GPU's memory before one is run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graphopt.execute.batch_sizes import BatchSize, Predict, memory_of, sized, walk_size
from graphopt.execute.block_runner import BlockRunner
from graphopt.execute.workloads import ZeroRunner
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Program
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import evaluate
from graphopt.memory.predict import Prediction, predict_peak
from graphopt.memory.recording import Tags
from graphopt.memory.workload import Workload
from graphopt.pass_manager.contract import Context
from graphopt.support.per_device import PerDevice, on_device
from graphopt.support.quantities import counted, format_bytes
from graphopt.training.distillation_data import TOKENS_AHEAD
from graphopt.training.held_out import run_student
from graphopt.training.losses import HiddenStateObjective, LogitObjective, relative_mse
from graphopt.training.parametrisations import FullParametrisation
from graphopt.training.step_memory import StepMemory, learn_from, make_states

REMEDY = "Give a lower seqlen, or --device cpu."
"""What to do where not even one window fits."""


class _Student(BlockRunner, ZeroRunner):
    """Blocks whose weights are zeros: how much memory a step takes does not depend on them."""


def training_workload(
    program: Program,
    device: torch.device,
    *,
    windows: int,
    seq: int,
    blocks: int,
    by_logits: bool = True,
    resident: int = 0,
    kept: int = 0,
    memory: StepMemory | None = None,
) -> Workload:
    """Return a step of training a program's last blocks on what a dense model gives, then a check.

    Weights are in fp32, and of the trained ones there are gradients, Adam's two states and a copy
    of the best values so far. The first iteration is the step, or one piece of it with gradients
    that are there already; the second is a check.

    Args:
        device: Where to train.
        windows, seq: Windows of a step, and tokens of each.
        blocks: How many blocks a step trains, from the last one backwards.
        by_logits: Whether the loss is that of the logits, or of hidden states.
        resident: Bytes that lie on the device beside the program: what the dense model has more.
        kept: Bytes of hidden states that are kept there.
        memory: How a step is kept small.
    """
    memory = memory or StepMemory()
    found = find_blocks(program)
    first, stop = found[-blocks].position, found[-1].position + 1
    trained: dict[str, FullParametrisation] = {}
    for call in program.calls[first:stop]:
        for name in call.weights.values():
            weight = program.weights[name]
            if not weight.constant and weight.dtype.is_floating_point:
                trained.setdefault(
                    name, FullParametrisation(torch.zeros(weight.shape, device=device))
                )
    student = _Student(program, first, stop, trained, device)
    student.recomputes = memory.recomputes
    # The program has its own values beside those that are trained.
    own = {w.name: ZeroRunner.weight(student, w.name) for w in program.used_weights()}
    held = {
        "dense": torch.zeros(resident, dtype=torch.uint8, device=device),
        "states": torch.zeros(kept, dtype=torch.uint8, device=device),
    }
    best = {name: p.value.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(student.parameters, lr=1e-5, fused=True)
    make_states(optimizer, student.parameters)
    ids = torch.zeros(windows, seq, dtype=torch.long, device=device)
    objective = LogitObjective() if by_logits else HiddenStateObjective(relative_mse)
    shape = _stream_shape(student, ids)
    target = torch.zeros(shape, dtype=student.kept_dtype, device=device)
    entry = torch.zeros_like(target) if blocks < len(found) else None
    iterations = itertools.count()

    at_once = min(windows, memory.at_once or windows)
    piece = ids[:at_once], target[:at_once], None if entry is None else entry[:at_once]

    def step() -> Any:
        if next(iterations):
            with torch.no_grad():
                objective.measure(*run_student(student, *piece), learn=False)
            return
        for parameter in student.parameters:
            parameter.grad = torch.zeros_like(parameter) if at_once < windows else None
        learn_from(student, objective, piece)
        optimizer.step()
        for parameter in student.parameters:
            parameter.grad = None

    def tags() -> Tags:
        states = {
            f"{number}.{key}": value
            for number, parameter in enumerate(student.parameters)
            for key, value in optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }
        inputs = {"input_ids": ids, "target": target} | ({} if entry is None else {"entry": entry})
        return {"weight": {**own, **held, **{f"best.{n}": b for n, b in best.items()}},
                "input": inputs, "optimizer": states}  # fmt: skip

    return Workload(f"training {blocks} blocks", step, device, tags, warm_up=1)


def _stream_shape(student: BlockRunner, ids: Tensor) -> tuple[int, ...]:
    """Return the shape of the hidden states behind the blocks."""
    values = student.window_inputs(ids)
    with torch.no_grad():
        student.run_range(values, 0, student.embedding)
    stream: Tensor = values[student.stream_into(student.embedding)]
    return tuple(stream.shape)


@dataclass(frozen=True)
class StepSize:
    """How many windows a step takes, and how.

    Attributes:
        windows: Windows of a step.
        memory: How it is kept small.
        fit: The windows that it runs at once, and what they are predicted to take.
    """

    windows: int
    memory: StepMemory
    fit: BatchSize

    def describe(self, what: str) -> str:
        """Return a sentence on what a step takes; "" where nothing was sized."""
        fit = self.fit
        if fit.memory is None or fit.unknown:
            return fit.describe(what)
        count = f"{counted(self.windows, 'window')} of {counted(fit.seq, 'token')}"
        less = self.memory.describe()
        return (
            f"{what} takes {count}, which is predicted to need {format_bytes(fit.bytes)} of "
            f"{format_bytes(fit.memory)}." + (f" To fit, it {less}." if less else "")
        )


def step_size(
    program: Program,
    windows: int,
    seq: int,
    device: torch.device,
    given: int | None,
    *,
    blocks: int,
    by_logits: bool,
    resident: int,
    kept: int,
    divisible: bool = True,
    remedy: str = REMEDY,
) -> StepSize:
    """Return how a training step fits: the first of these that does, by predictions.

    All windows at once, or as many as fit at once, gradients being added up; where not even one
    does, blocks are run again in the backward pass; and where a record of the step has no room,
    none is made. Where the loss compares windows, a step of fewer windows is taken.

    Args:
        windows: As many as a step takes with memory enough.
        given: Bytes that the user lets it have; None for all of the device's.
        blocks, by_logits, resident, kept: See `training_workload`.
        divisible: Whether the loss of a step is the mean of its windows' losses.
        remedy: What to do where nothing fits.

    Raises:
        PassError: Not even one window fits.
    """
    limit = memory_of(device, given)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)

    def predictor(form: StepMemory) -> Predict:
        def predict(at_once: int, length: int, limit: int) -> Prediction:
            count = windows if divisible else at_once
            memory = replace(form, at_once=at_once if at_once < count else None)
            return predict_peak(
                lambda place: training_workload(
                    program, place, windows=count, seq=length, blocks=blocks,
                    by_logits=by_logits, resident=resident, kept=kept, memory=memory,
                ),
                recorded=0 if form.recorded else None, capability=capability, limit=limit,
            )  # fmt: skip

        return predict

    forms = [StepMemory(), StepMemory(recomputes=True), StepMemory(recomputes=True, recorded=False)]
    for form in forms:
        last = form is forms[-1]
        # Pieces of a step are about equal, so that not more than a half are of use.
        most = -(-windows // 2) if divisible else None
        fit = sized(predictor(form), windows, seq, limit, remedy, most=most, required=last)
        if fit is not None:
            break
    assert fit is not None
    if not divisible:
        return StepSize(fit.windows, form, fit)
    pieces = -(-windows // fit.windows)
    at_once = -(-windows // pieces)
    return StepSize(windows, replace(form, at_once=at_once if pieces > 1 else None), fit)


@dataclass(frozen=True)
class StepSizes:
    """What a training takes at once.

    Attributes:
        step: What a training step takes.
        ahead: Windows over which the dense model is run at once, to keep its hidden states.
    """

    step: StepSize
    ahead: BatchSize

    @classmethod
    def of(
        cls,
        program: Program,
        dense: Program,
        batch: int | PerDevice[int],
        windows: Tensor,
        context: Context,
        blocks: int,
        *,
        by_logits: bool = True,
        divisible: bool = True,
        streams: bool = False,
        remedy: str = REMEDY,
    ) -> StepSizes:
        """Return the sizes for training a program on a dense one.

        Args:
            batch: The option.
            windows: The text, int64 [N, S].
            context: Says where to train, and how much memory that may have.
            blocks: How many blocks are trained at once.
            by_logits: Whether by logits, or by hidden states.
            divisible: Whether the loss of a step is the mean of its windows' losses. Where it is
                not, a number of windows that the user gave is kept.
            streams: Whether weights lie on the host: then steps are not sized.
            remedy: What to do where nothing fits.

        Raises:
            PassError: Not even one window fits.
        """
        count, seq = windows.shape
        device, given = context.device, context.memory
        usual = on_device(batch, device)
        ahead = walk_size(program, seq, TOKENS_AHEAD, device, given)
        fixed = not isinstance(batch, PerDevice) and not divisible
        if device.type != "cuda" or streams or fixed:
            return cls(StepSize(usual, StepMemory(), BatchSize(usual, usual, seq)), ahead)
        shared = {id(weight.producer) for weight in program.used_weights()}
        more = (w for w in dense.used_weights() if id(w.producer) not in shared)
        behind = program.calls[find_blocks(program)[-1].position].results[0]
        width = evaluate(infer_program(program)[1][behind].shape[-1], {})
        step = step_size(
            program, usual, seq, device, given, blocks=blocks, by_logits=by_logits,
            resident=4 * sum(weight.numel for weight in more), kept=2 * count * seq * width,
            divisible=divisible, remedy=remedy,
        )  # fmt: skip
        return cls(step, ahead)

    def sentences(self) -> list[str]:
        """Return what is said of the sizes; nothing where nothing was sized."""
        told = [self.ahead.describe("The dense model's run ahead")]
        told.append(self.step.describe("A training step"))
        return [sentence for sentence in told if sentence]
