"""RMS norms that are trained through: a kernel each way on a GPU, else in torch.

In torch a root-mean-square norm is 6 kernels in one direction and 14 in the other, most of which
read or write the residual stream in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from graphopt.execute.takes_kernels import takes_kernels
from graphopt.ir import functional
from graphopt.ir.ops.base import Attrs, Tensors, optional
from graphopt.runtime.fused import (
    launch_norm,
    named_strides,
    power_of_two,
    strides_of_rows,
    warps_for,
)

PROGRAMS = 512
"""Programs that share the rows of a gradient at most: each adds up a part of the gain's."""
ELEMENTS = 2048
"""Elements of x that a program has at once, where rows are not longer."""
WIDEST = 8192
"""Features of a row that a program holds in registers."""


def rms_norm(tensors: Tensors, attrs: Attrs, *, for_products: bool = False) -> tuple[Tensor, ...]:
    """As the torch form of the op `rms_norm`, which takes what the kernels do not.

    A second derivative is refused.

    Args:
        for_products: Whether products alone read the norm. Under autocast, which rounds what they
            read each time, it is then rounded once; their gradients are added up rounded, too.

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """
    x, weight = tensors[0], optional(tensors, 1)
    assert x is not None
    numbers = float(attrs["eps"]), float(attrs.get("offset", 0.0))
    given = [x] if weight is None else [x, weight]
    fits = x.numel() > 0 and x.shape[-1] <= WIDEST
    if not (takes_kernels(*given) and fits and (weight is None or weight.shape == x.shape[-1:])):
        return (functional.rms_norm(x, weight, *numbers),)
    dtype, kind = x.dtype, x.device.type
    if for_products and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return (_rms_norm(x, weight if weight is None else weight.contiguous(), *numbers, dtype),)


@torch.library.custom_op("graphopt::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, dtype: torch.dtype
) -> Tensor:
    """The norm, an operator of torch with a gradient: tensors without values go through as well."""
    with torch.cuda.device_of(x):
        return launch_norm(x, None, weight, eps, offset, dtype)[1]


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, eps, offset, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.numbers = eps, offset


def _slopes(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    learns = weight is not None and ctx.needs_input_grad[1]
    out, parts = _gradient(slope, x, weight, *ctx.numbers, learns)
    return out, parts.sum(0).to(weight.dtype) if learns else None, None, None, None


_rms_norm.register_autograd(_slopes, setup_context=_keep)


def launch_gradient(
    slope: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float, learns: bool
) -> tuple[Tensor, Tensor]:
    """Run the kernel.

    Args:
        slope: The gradient of the norm of `x`, both [..., N].
        weight: [N].
        learns: Whether the gradient of `weight` is wanted as well.

    Returns:
        The gradient of `x`, and fp32 [P, N] whose sum over the first axis is that of `weight`,
        with P = 0 if it is not wanted.
    """
    from graphopt.runtime.kernels.norm_gradient import rms_norm_gradient

    out, parts = _made(slope, x, weight, eps, offset, learns)
    (slope, x), sizes, strides = strides_of_rows(slope, x)
    held, programs = _shares(x)
    block = power_of_two(x.shape[-1])
    with torch.cuda.device_of(x):
        rms_norm_gradient[(programs,)](
            slope, x, weight, out, parts if learns else None, math.prod(sizes), sizes[1], sizes[2],
            **named_strides("slope", strides[0]), **named_strides("x", strides[1]),
            eps=eps, offset=offset, N=x.shape[-1], ROWS=held, BLOCK=block,
            num_warps=warps_for(held * block),
        )  # fmt: skip
    return out, parts


_gradient = torch.library.custom_op("graphopt::rms_norm_gradient", launch_gradient, mutates_args=())


@_gradient.register_fake
def _made(
    slope: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float, learns: bool
) -> tuple[Tensor, Tensor]:
    """Return room for both gradients."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = _shares(x)[1] if learns else 0
    return out, torch.empty((programs, x.shape[-1]), dtype=torch.float32, device=x.device)


def _shares(x: Tensor) -> tuple[int, int]:
    """Return the rows that a program of the gradient has at once, and how many programs run."""
    width = x.shape[-1]
    rows = x.numel() // width
    held = min(max(1, ELEMENTS // power_of_two(width)), power_of_two(rows))
    return held, min(PROGRAMS, -(-rows // held))
