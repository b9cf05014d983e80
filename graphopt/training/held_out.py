"""How far a student is from its teacher, on the windows that it does not learn from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.execute.block_runner import BlockRunner
from graphopt.support.ranks import ALONE, here
from graphopt.training.distillation_data import DistillationData
from graphopt.training.losses import Objective


def run_student(
    student: BlockRunner, ids: Tensor, target: Tensor, entry: Tensor | None
) -> tuple[BlockRunner, dict[str, Any], Tensor]:
    """Run a student's blocks on a batch; return what `Objective.measure` asks for.

    Args:
        ids: int64 [B, S].
        target: The teacher's hidden states in the place of the student's exit, [B, S, D].
        entry: The hidden states in front of its first call; None to make them of the ids.
    """
    values = student.window_inputs(ids)
    with torch.no_grad():
        student.run_range(values, 0, student.embedding)
    if entry is not None:
        values[student.entry] = entry
    first = student.embedding if entry is None else student.first
    if student.compiled and torch.is_grad_enabled():
        # As the other blocks' streams do: with one that does not, it is another function.
        stream = student.stream_into(first)
        values[stream] = values[stream].detach().requires_grad_()
    student.run_range(values, first, student.stop)
    return student, values, target


@torch.no_grad()
def held_out_loss(
    student: BlockRunner, data: DistillationData, objective: Objective, batch: int
) -> float:
    """Return a student's loss on the held-out windows, `batch` of them at a time.

    Ranks share them, where the loss of several is the mean of theirs.
    """
    count, total = data.held_out, 0.0
    ranks = here() if objective.additive else ALONE
    together = batch * ranks.world
    for start in range(len(data.ids) - count, len(data.ids), together):
        rows = list(range(start, min(start + together, len(data.ids))))
        own = ranks.share(len(rows))
        given = data.batch(rows, student.device, own)
        if own:
            loss = objective.measure(*run_student(student, *given), learn=False)
            total += float(loss) * len(own) / count
    return ranks.totals(total)[0]
