"""A step of a training in as little memory as it has to be: in pieces, its blocks run twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.execute.block_runner import BlockRunner
from graphopt.support.recorded import record
from graphopt.training.held_out import run_student
from graphopt.training.losses import Objective


@dataclass(frozen=True)
class StepMemory:
    """What a step does to take less memory; its result is the same but for rounding.

    Attributes:
        at_once: Windows that are run at once, whose gradients are added up; None for all.
        recomputes: Whether the backward pass runs each block again, so that between the passes
            only the residual stream is held.
        recorded: Whether a GPU records the step, where it can: a record has memory of its own.
    """

    at_once: int | None = None
    recomputes: bool = False
    recorded: bool = True

    def describe(self) -> str:
        """Return what a step does for it, as the rest of a sentence; "" if nothing."""
        told = []
        if self.at_once is not None:
            told.append(f"runs {self.at_once:,} at once and adds up gradients")
        if self.recomputes:
            told.append("runs each block again in the backward pass")
        if not self.recorded:
            told.append("is not recorded as a CUDA graph")
        return ", ".join(told[:-1]) + " and " * (len(told) > 1) + "".join(told[-1:])

    def less(self, windows: int, divisible: bool) -> StepMemory | None:
        """Return what takes less than this; None where nothing is known.

        Args:
            windows: Windows of a step.
            divisible: Whether the loss of a step is the mean of its windows' losses.
        """
        at_once = min(self.at_once or windows, windows)
        if self.recorded:
            return replace(self, recorded=False)
        if divisible and at_once > 1:
            return replace(self, at_once=-(-at_once // 2))
        return None if self.recomputes else replace(self, recomputes=True)


def learn_from(
    student: BlockRunner,
    objective: Objective,
    batch: tuple[Tensor, Tensor, Tensor | None],
    at_once: int | None = None,
) -> Tensor:
    """Add a batch's gradients to those of the student's parameters; return its loss.

    Args:
        batch: Ids [B, S], targets [B, S, D], and the states at the student's entry, or None.
        at_once: Windows that are run at once; all by default, and where the loss compares windows.
    """
    ids, target, entry = batch
    count = len(ids)
    if at_once is None or at_once >= count or not objective.additive:
        return objective.measure(*run_student(student, ids, target, entry), learn=True)
    apart = _beside_the_loss(student)
    total = torch.zeros((), device=student.device)
    for start in range(0, count, at_once):
        ids_part, target_part = ids[start : start + at_once], target[start : start + at_once]
        entry_part = None if entry is None else entry[start : start + at_once]
        share = len(ids_part) / count
        before = [None if p.grad is None else p.grad.clone() for p in apart]
        given = run_student(student, ids_part, target_part, entry_part)
        total += share * objective.measure(*given, learn=True, share=share)
        del given
        for parameter, held in zip(apart, before, strict=True):
            if parameter.grad is None:
                continue
            if held is None:
                parameter.grad.mul_(share)
            else:
                parameter.grad.sub_(held).mul_(share).add_(held)
    return total


def _beside_the_loss(student: BlockRunner) -> list[nn.Parameter]:
    """Return parameters with gradients of their own, means over tokens, whatever the loss is."""
    return [
        parameter
        for part in student.trained
        if not part.counts and not part.rates()
        for parameter in part.parameters()
    ]


@torch.no_grad()
def make_states(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Make an optimizer's states, all of which are zero, in front of the first step.

    Made by that step they would lie between its activations, and keep a GPU's allocator from
    giving their memory back. Rates and gradients must be 0, where there are any.
    """
    without = [parameter for parameter in parameters if parameter.grad is None]
    for parameter in without:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in parameters:
        optimizer.state[parameter]["step"].zero_()
    for parameter in without:
        parameter.grad = None


class RecordedStep:
    """A step of a training as a CUDA graph: its thousands of kernels are launched at once."""

    def __init__(self, work: Callable[..., Any], batch: Sequence[Tensor | None]) -> None:
        self._places = [None if value is None else value.clone() for value in batch]
        device = next(place.device for place in self._places if place is not None)
        self._graph, self._loss = record(lambda: work(*self._places), device, runs=0)

    def replay(self, batch: Sequence[Tensor | None]) -> Any:
        for place, value in zip(self._places, batch, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        self._graph.replay()
        return self._loss
