"""What a student is held to."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import PassError
from graphopt.execute.block_runner import BlockRunner

TOKENS_OF_LOGITS = 2048
"""Tokens whose logits are in memory at once."""


def relative_mse(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared error of every token, in units of its target's square, averaged over tokens.

    Without the division a few tokens of huge norm, which most models have, decide the loss.
    """
    ours, theirs = ours.float(), theirs.float()
    error = (ours - theirs).square().sum(-1)
    return (error / theirs.square().sum(-1).clamp(min=1e-12)).mean()


def batch_kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(softmax(theirs) || softmax(ours)) over the batch, summed and divided by it.

    Source: FuseGPT, arXiv 2411.14507, equations 5 and 6. Each (token, feature) is a distribution
    over the sequences of the batch, so that an error which all sequences share costs nothing.

    Raises:
        PassError: The batch has one sequence: the loss would be 0 whatever the student gives.
    """
    if ours.shape[0] < 2:
        raise PassError(
            "The loss batch_kl compares the sequences of a batch, and there is one.",
            "Give batch=2 or more, or another loss.",
        )
    p = torch.log_softmax(theirs.float(), 0)
    q = torch.log_softmax(ours.float(), 0)
    return (p.exp() * (p - q)).sum() / ours.shape[0]


class Objective(ABC):
    """What a student is held to."""

    @abstractmethod
    def measure(
        self, student: BlockRunner, values: dict[str, Any], target: Tensor, learn: bool
    ) -> Tensor:
        """Return the loss of a batch, in fp32 without gradient.

        Args:
            values: What `BlockRunner.run_range` left.
            target: [B, S, D], what the dense model has in the place of the student's exit.
            learn: Also add to the gradients of the student's parameters.
        """


@dataclass(frozen=True)
class StreamObjective(Objective):
    """The stream itself, by `relative_mse`, `batch_kl` or another loss of two streams."""

    loss: Callable[[Tensor, Tensor], Tensor]

    def measure(
        self, student: BlockRunner, values: dict[str, Any], target: Tensor, learn: bool
    ) -> Tensor:
        loss = self.loss(values[student.exit], target)
        if learn:
            loss.backward()
        return loss.detach()


class LogitObjective(Objective):
    """KL(dense || student) of the next token's distribution, averaged over tokens.

    Both models share the calls behind the student's exit, so the dense model's stream there
    stands for its logits, and only a few thousand tokens' logits are in memory at a time.
    Source: Hinton et al., arXiv 1503.02531, section 2, at temperature 1.
    """

    def measure(
        self, student: BlockRunner, values: dict[str, Any], target: Tensor, learn: bool
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
                theirs = self._logits(student, values, target[start : start + rows], start, rows)
                compare = _compiled_divergence() if student.compiled else _divergence
                loss, gradient = compare(logits.detach(), theirs, batch * length)
                total += loss
            if learn:
                logits.backward(gradient)
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


def _divergence(ours: Tensor, theirs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return KL(theirs || ours) of logits [.., V], summed over `count`, and its gradient in ours.

    The gradient is the difference of the probabilities.
    """
    wanted = torch.log_softmax(theirs.float(), -1)
    found = torch.log_softmax(ours.float(), -1)
    p = wanted.exp()
    loss = (p * wanted.sub_(found)).sum() / count
    return loss, found.exp_().sub_(p).div_(count).to(ours.dtype)


@functools.cache
def _compiled_divergence() -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    return torch.compile(_divergence, dynamic=False)
