"""KL of next-token distributions, with its gradient: by one kernel on a GPU, else in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.execute.takes_kernels import takes_kernels

BLOCK, WARPS = 4096, 8
"""Logits of a row that a program of the kernel has at once, and its warps."""


def divergence(student: Tensor, teacher: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) of logits, divided by `count`, and its gradient.

    The gradient is that of the student's logits: the difference of the probabilities. In torch a
    dozen tensors of fp32 logits are written and read for it; the kernel, which GPUs from Ampere on
    run, reads the logits twice and writes the gradient.

    Args:
        student, teacher: [..., V].

    Returns:
        fp32 [], and [..., V] in the student's dtype.

    Source: Hinton et al., arXiv 1503.02531, section 2, at temperature 1.
    """
    if not takes_kernels(student, teacher):
        return divergence_in_torch(student, teacher, count)
    rows = student.flatten(0, -2), teacher.flatten(0, -2)
    losses, gradient = _row_divergence(*rows, 1 / count)
    return losses.sum(), gradient.view(student.shape)


def divergence_in_torch(student: Tensor, teacher: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `divergence`."""
    log_teacher = torch.log_softmax(teacher.float(), -1)
    log_student = torch.log_softmax(student.float(), -1)
    p = log_teacher.exp()
    loss = (p * log_teacher.sub_(log_student)).sum() / count
    return loss, log_student.exp_().sub_(p).div_(count).to(student.dtype)


def launch_divergence(student: Tensor, teacher: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Run the kernel.

    Args:
        student, teacher: [T, V].
        share: What losses and gradients are times.

    Returns:
        The loss of each row, fp32 [T], and the gradient [T, V].
    """
    from graphopt.runtime.kernels.divergence import row_divergence

    student, teacher = (x if x.stride(-1) == 1 else x.contiguous() for x in (student, teacher))
    losses, gradient = _made(student)
    with torch.cuda.device_of(student):
        row_divergence[(len(student),)](
            student, teacher, gradient, losses, student.stride(0), teacher.stride(0),
            student.shape[1], share, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return losses, gradient


@torch.library.custom_op("graphopt::row_divergence", mutates_args=())
def _row_divergence(student: Tensor, teacher: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """As `launch_divergence`.

    An operator of torch, so that tensors without values are run through a step as well.
    """
    return launch_divergence(student, teacher, share)


@_row_divergence.register_fake
def _(student: Tensor, teacher: Tensor, share: float) -> tuple[Tensor, Tensor]:
    return _made(student)


def _made(student: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for the losses of rows, and for their gradients."""
    losses = student.new_empty(len(student), dtype=torch.float32)
    return losses, torch.empty_like(student, memory_format=torch.contiguous_format)
