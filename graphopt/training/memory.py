"""How many windows a training step takes: predicted for a GPU's memory before one is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.execute.batch_sizes import BatchSize, memory_of, sized, walk_size
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
from graphopt.training.distillation_data import TOKENS_AHEAD
from graphopt.training.held_out import run_student
from graphopt.training.losses import HiddenStateObjective, LogitObjective, relative_mse
from graphopt.training.parametrisations import FullParametrisation


class _Student(BlockRunner, ZeroRunner):
    """Blocks whose weights are zeros: how much memory a step takes does not depend on them."""


def training_workload(
    program: Program,
    device: torch.device,
    *,
    windows: int,
    seq: int,
    blocks: int,
    resident: int = 0,
    kept: int = 0,
) -> Workload:
    """Return a step of training a program's last blocks on what a dense model gives.

    Weights are in fp32, and of the trained ones there are gradients, Adam's two states and a copy
    of the best values so far. Where the last block is trained the loss is that of the logits.

    Args:
        device: Where to train.
        windows, seq: Windows of a step, and tokens of each.
        blocks: How many blocks a step trains, from the last one backwards.
        resident: Bytes that lie on the device beside the program: what the dense model has more.
        kept: Bytes of hidden states that are kept there.
    """
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
    # The program has its own values beside those that are trained.
    own = {w.name: ZeroRunner.weight(student, w.name) for w in program.used_weights()}
    held = {
        "dense": torch.zeros(resident, dtype=torch.uint8, device=device),
        "states": torch.zeros(kept, dtype=torch.uint8, device=device),
    }
    best = {name: p.value.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(student.parameters, lr=1e-5, fused=True)
    ids = torch.zeros(windows, seq, dtype=torch.long, device=device)
    whole = blocks == len(found)
    objective = LogitObjective() if whole else HiddenStateObjective(relative_mse)
    shape = _stream_shape(student, ids)
    target = torch.zeros(shape, dtype=student.kept_dtype, device=device)

    def step() -> Any:
        for parameter in student.parameters:
            parameter.grad = None
        objective.measure(*run_student(student, ids, target, None), learn=True)
        optimizer.step()

    def tags() -> Tags:
        states = {
            f"{number}.{key}": value
            for number, parameter in enumerate(student.parameters)
            for key, value in optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }
        return {"weight": {**own, **held, **{f"best.{n}": b for n, b in best.items()}},
                "input": {"input_ids": ids, "target": target}, "optimizer": states}  # fmt: skip

    return Workload(f"training {blocks} blocks", step, device, tags, warm_up=1)


def _stream_shape(student: BlockRunner, ids: Tensor) -> tuple[int, ...]:
    """Return the shape of the hidden states behind the blocks."""
    values = student.window_inputs(ids)
    with torch.no_grad():
        student.run_range(values, 0, student.embedding)
    stream: Tensor = values[student.stream_into(student.embedding)]
    return tuple(stream.shape)


def training_size(
    program: Program,
    usual: int,
    seq: int,
    device: torch.device,
    given: int | None,
    *,
    blocks: int,
    resident: int,
    kept: int,
) -> BatchSize:
    """Return how many windows a training step takes.

    Args:
        usual: As many as it takes with memory enough.
        given: Bytes that the user lets it have; None for all of the device's.
        blocks, resident, kept: See `training_workload`.

    Raises:
        PassError: Not even one window fits.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)

    def predict(windows: int, limit: int) -> Prediction:
        return predict_peak(
            lambda place: training_workload(
                program, place, windows=windows, seq=seq, blocks=blocks, resident=resident,
                kept=kept,
            ),
            capability=capability,
            limit=limit,
        )  # fmt: skip

    return sized(
        predict, usual, seq, memory_of(device, given),
        "Give a lower seqlen, fewer blocks at a time (mode=local), or --device cpu.",
    )  # fmt: skip


@dataclass(frozen=True)
class StepSizes:
    """What a training takes at once.

    Attributes:
        step: Windows of a training step; None where the user gave a number.
        windows: That number, or what `step` has.
        ahead: Windows over which the dense model is run at once, to keep its hidden states.
    """

    step: BatchSize | None
    windows: int
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
        streams: bool = False,
    ) -> StepSizes:
        """Return the sizes for training a program on a dense one.

        Args:
            batch: The option: a number that the user gave is kept, a usual one is sized.
            windows: The text, int64 [N, S].
            context: Says where to train, and how much memory that may have.
            blocks: How many blocks are trained at once.
            streams: Whether weights lie on the host: then steps are of the usual size.

        Raises:
            PassError: Not even one window fits.
        """
        count, seq = windows.shape
        device, given = context.device, context.memory
        usual = on_device(batch, device)
        ahead = walk_size(program, seq, TOKENS_AHEAD, device, given)
        if not isinstance(batch, PerDevice) or device.type != "cuda" or streams:
            return cls(None, usual, ahead)
        shared = {id(weight.producer) for weight in program.used_weights()}
        more = (w for w in dense.used_weights() if id(w.producer) not in shared)
        behind = program.calls[find_blocks(program)[-1].position].results[0]
        width = evaluate(infer_program(program)[1][behind].shape[-1], {})
        step = training_size(
            program, usual, seq, device, given, blocks=blocks,
            resident=4 * sum(weight.numel for weight in more), kept=2 * count * seq * width,
        )  # fmt: skip
        return cls(step, step.windows, ahead)

    def sentences(self) -> list[str]:
        """Return what is said of the sizes; nothing where nothing was sized."""
        told = [self.ahead.describe("The dense model's run ahead")]
        if self.step is not None:
            told.append(self.step.describe("A training step"))
        return [sentence for sentence in told if sentence]
