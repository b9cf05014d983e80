"""Losses of a student: how far its hidden states or logits are from those of the dense model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import PassError
from graphopt.execute.block_runner import BlockRunner
from graphopt.training.divergence import divergence

TOKENS_OF_LOGITS = 2048
"""Tokens whose logits are in memory at once."""


def relative_mse(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of every token relative to its target's square, averaged over them.

    Without the division a few tokens of huge norm, which most models have, decide the loss.
    """
    output, target = output.float(), target.float()
    error = (output - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp(min=1e-12)).mean()


def batch_kl(output: Tensor, target: Tensor) -> Tensor:
    """Return KL(softmax(target) || softmax(output)) over the batch, summed and divided by its size.

    Source: FuseGPT, arXiv 2411.14507, equations 5 and 6. Each (token, feature) is a distribution
    over the sequences of the batch, so that an error which all sequences share costs nothing.

    Raises:
        PassError: The batch has one sequence: the loss would be 0 whatever the student gives.
    """
    if output.shape[0] < 2:
        raise PassError(
            "The loss batch_kl compares the sequences of a batch, and there is one.",
            "Give batch=2 or more, or another loss.",
        )
    p = torch.log_softmax(target.float(), 0)
    q = torch.log_softmax(output.float(), 0)
    return (p.exp() * (p - q)).sum() / output.shape[0]


class Objective(ABC):
    """The loss of a student on a batch.

    Attributes:
        additive: Whether the loss of a batch is the mean of its windows' losses, so that ranks may
            share them.
    """

    additive = True

    @abstractmethod
    def measure(
        self,
        student: BlockRunner,
        values: dict[str, Any],
        target: Tensor,
        learn: bool,
        share: float = 1.0,
    ) -> Tensor:
        """Return the loss of a batch, in fp32 without gradient.

        Args:
            values: What `BlockRunner.run_range` left.
            target: [B, S, D], what the dense model has in the place of the student's exit.
            learn: Also add to the gradients of the student's parameters.
            share: What those are times: the batch's share of a larger one.
        """


@dataclass(frozen=True)
class HiddenStateObjective(Objective):
    """The hidden states themselves, by `relative_mse`, `batch_kl` or another loss of two."""

    loss: Callable[[Tensor, Tensor], Tensor]
    additive: bool = True

    def measure(
        self,
        student: BlockRunner,
        values: dict[str, Any],
        target: Tensor,
        learn: bool,
        share: float = 1.0,
    ) -> Tensor:
        loss = self.loss(values[student.exit], target)
        if learn:
            (loss if share == 1 else share * loss).backward()
        return loss.detach()


class LogitObjective(Objective):
    """KL(dense || student) of the next token's distribution, averaged over tokens.

    Both models share the calls behind the student's exit, so the dense model's stream there
    stands for its logits, and only a few thousand tokens' logits are in memory at a time.
    Source: Hinton et al., arXiv 1503.02531, section 2, at temperature 1.
    """

    def measure(
        self,
        student: BlockRunner,
        values: dict[str, Any],
        target: Tensor,
        learn: bool,
        share: float = 1.0,
    ) -> Tensor:
        stream = values[student.exit]
        batch, length, _ = stream.shape
        rows = max(1, TOKENS_OF_LOGITS // length)
        total = stream.new_zeros((), dtype=torch.float32)
        gradients: list[Tensor] = []
        for start in range(0, batch, rows):
            part = stream[start : start + rows].detach().requires_grad_(learn)
            logits = self._logits(student, values, part, start, rows)
            with torch.no_grad():
                teacher = self._logits(student, values, target[start : start + rows], start, rows)
                loss, gradient = divergence(logits.detach(), teacher, batch * length)
                total += loss
            if learn:
                logits.backward(gradient if share == 1 else gradient.mul_(share))
                assert part.grad is not None
                gradients.append(part.grad)
        if learn:
            stream.backward(torch.cat(gradients).to(stream.dtype))
        return total

    @staticmethod
    def _logits(
        student: BlockRunner, values: Mapping[str, Any], stream: Tensor, start: int, rows: int
    ) -> Tensor:
        count = len(values["input_ids"])
        part = {
            name: value[start : start + rows]
            if isinstance(value, Tensor) and value.dim() and len(value) == count
            else value
            for name, value in values.items()
        }
        part[student.exit] = stream
        student.run_range(part, student.stop, len(student.program.calls))
        logits: Tensor = part[student.program.outputs[0]]
        return logits
