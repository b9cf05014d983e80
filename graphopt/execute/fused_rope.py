"""Rotary positions that are trained through: a kernel each way on a GPU, else in torch.

The gradient of a rotation is the rotation by the angle less than zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.execute.takes_kernels import takes_kernels
from graphopt.ir import functional
from graphopt.ir.ops.base import Attrs, Tensors
from graphopt.runtime.fused import launch_rope


def rope(tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
    """As the torch form of the op `rope`, which takes what the kernel does not.

    The kernel rounds its results once, where torch rounds products and their sums. A second
    derivative is refused.
    """
    x, cos, sin = tensors
    assert x is not None and cos is not None and sin is not None
    interleaved, first = attrs.get("interleaved", False), attrs.get("heads_first", True)
    fixed = not (cos.requires_grad or sin.requires_grad)
    if not (takes_kernels(x, cos, sin) and x.numel() > 0 and fixed):
        return (functional.rope(x, cos, sin, interleaved, first),)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned = _rope(x if first else x.transpose(1, 2), cos, sin, interleaved)
    return (turned if first else turned.transpose(1, 2),)


@torch.library.custom_op("graphopt::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotation of heads [B, H, S, D], an operator of torch with a gradient."""
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    with torch.cuda.device_of(x):
        return launch_rope(x, None, cos, sin, interleaved)[0]


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    batch, heads, count, width = x.shape
    tokens_first = torch.empty((batch, count, heads, width), dtype=x.dtype, device=x.device)
    return tokens_first.transpose(1, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _back(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return _rope(slope, cos, -sin, ctx.interleaved), None, None, None


_rope.register_autograd(_back, setup_context=_keep)
