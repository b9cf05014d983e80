"""Kronecker transforms of activations on a GPU, and their rounding to codes, in Triton.

One kernel does a norm or a gate, the transform and the rounding of a token where both factors and
the token fit into the shared memory of a core. Of larger ones the right product is cuBLAS's, and
of still larger ones the left one as well (FlatQuant, arXiv 2410.09426, section 3.3 and appendix
B.3).

Layout letters: N1, N2 the sizes of the left and the right factor; a token has N1 N2 features.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.runtime.fitting_tiles import with_fewer_stages
from graphopt.runtime.fused import (
    launch_act_mul,
    launch_norm,
    overlapping,
    runs_by_kernel,
    strides_of_rows,
)
from graphopt.runtime.kronecker import launch_many

MANY_TOKENS = 512
"""From how many on the kernel in CUDA C++ has some for each block, of which one is on its way."""
LARGEST_TILE = 32768
"""Elements of a token that a program holds at most: 64 numbers of each of its 512 threads."""


def power(size: int) -> int:
    """Return the power of two from a size up; but for 1 at least 16, as matrix units multiply."""
    return 1 if size == 1 else max(16, 1 << (size - 1).bit_length())


def split(size: int) -> tuple[int, int]:
    """Return a size as two powers of two, the second 0 where one alone is not larger than both."""
    whole = power(size)
    if whole in (1, 16) or whole == size:
        return whole, 0
    rest = power(size - whole // 2)
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


def _warps(n1: int, n2: int) -> int:
    """Return how many warps hold a token, each 1,024 to 2,047 elements of it."""
    each = max(1, n1 * n2 // 1024)
    return min(16, 1 << (each.bit_length() - 1))


@functools.cache
def _resident(device: torch.device) -> int:
    """Return how many warps with some 64 registers a thread a GPU holds at once."""
    if device.type != "cuda":
        return 64
    return 32 * torch.cuda.get_device_properties(device).multi_processor_count


def fits(left: int | None, right: int | None, n1: int, n2: int, shared_bytes: int) -> bool:
    """Return whether a program can multiply a token by these factors.

    A product's operands lie in shared memory beside each other, of 16 bits: FlatQuant's
    2 (n1^2 + 2 n1 n2) and 2 (n2^2 + 2 n1 n2) bytes, of sizes rounded up to powers of two.

    Args:
        left, right: Sizes of the factors, None for one that is not there.
        n1, n2: What a token is divided into.
    """
    token = 2 * power(n1) * power(n2)
    return power(n1) * power(n2) <= LARGEST_TILE and all(
        2 * (power(size) ** 2 + token) <= shared_bytes for size in (left, right) if size
    )


@functools.cache
def _shared_bytes_of(device: torch.device) -> int | None:
    """Return the shared memory that a program may have on a GPU; None on anything else."""
    if device.type != "cuda":
        return None
    from triton.runtime import driver

    number = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(number)["max_shared_mem"])


def launch_transform(
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    before: str = "",
    y: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    clip_low: Tensor | None = None,
    clip_high: Tensor | None = None,
    bits: int = 0,
    pairs: bool = False,
    sizes: tuple[int, int] | None = None,
    programs: int | None = None,
    warps: int | None = None,
    stages: int = 1,
    joined: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Transform tokens in one kernel, with what `before` says in front of it.

    Args:
        x: [..., N1 N2] of 16 bits.
        left, right: [N1, N1] and [N2, N2] of the dtype of `x`.
        before: `norm`: take the norm of `x`, or of `x + y`, times `weight + offset`; the name of
            an activation: take act(x) y.
        clip_low, clip_high: One number each, which the least and the largest value of a token are
            times before its scale is taken of them.
        bits: 4 or 8: round to codes of so many bits; 0: give values.
        pairs: Put two codes into a byte.
        sizes: (N1, N2), where a factor is absent.
        programs: How many programs take turns; by default as many as a GPU may hold at once, so
            that each reads the factors once.
        warps: Of a program; by default one for each 1,024 elements of a token or more.
        stages: Tokens that a program reads ahead.
        joined: Take N1 as one power of two, even where two together are smaller.

    Returns:
        Codes or values, the scales fp32 [...] of codes, and `x + y` for a norm of it.
    """
    from graphopt.runtime.kernels.transform import transform as kernel

    n1 = len(left) if left is not None else 0
    n2 = len(right) if right is not None else 0
    if sizes is not None:
        n1, n2 = sizes
    n1, n2 = n1 or x.shape[-1] // n2, n2 or x.shape[-1] // n1
    lead = x.shape[:-1]
    tensors, shape, strides = strides_of_rows(x) if y is None else strides_of_rows(x, y)
    tokens = math.prod(lead)
    device = x.device
    total = torch.empty(x.shape, dtype=x.dtype, device=device) if before == "norm" and (
        y is not None
    ) else None  # fmt: skip
    if bits == 0:
        out = torch.empty(x.shape, dtype=x.dtype, device=device)
    elif pairs:
        out = torch.empty(*lead, x.shape[-1] // 2, dtype=torch.uint8, device=device)
    else:
        out = torch.empty(x.shape, dtype=torch.int8, device=device)
    scales = torch.empty(lead, dtype=torch.float32, device=device) if bits else None
    first, rest = (power(n1), 0) if joined else split(n1)
    b2 = power(n2)
    warps = warps or _warps(first + rest, b2)
    programs = programs or _resident(device) // warps
    given = {
        f"{name}_stride_{axis}": stride
        for name, row in (("x", strides[0]), ("y", strides[-1]))
        for axis, stride in enumerate(row)
    }
    given_factors = left, right
    left = None if left is None else left.contiguous()
    right = None if right is None else right.contiguous()
    # A kernel that starts early reads factors before the one in front, which may copy one, ends.
    copied = left is not given_factors[0] or right is not given_factors[1]
    early = {"OVERLAP": False} if copied else overlapping(device)

    def start(stages: int) -> None:
        kernel[(min(tokens, programs),)](
            tensors[0], None if y is None else tensors[1], weight, left, right,
            clip_low, clip_high, total, out, scales, tokens, shape[1], shape[2],
            **given, eps=float(eps), offset=float(offset),
            N1=n1, N2=n2, D0=first, D1=rest, B2=b2, BEFORE=before, BITS=bits, PAIRS=pairs,
            num_warps=warps, num_stages=stages, **early,
        )  # fmt: skip

    key = "transform", n1, n2, left is None, right is None, before, bits, warps, stages, device
    with_fewer_stages(key, stages, start)
    return out, scales, total


class TransformKernels:
    """`transformed` within the shared memory of a target, and of the GPU at hand.

    Args:
        shared_bytes: What a program may have of it on the target; a GPU may have less.
    """

    def __init__(self, shared_bytes: int) -> None:
        self._shared_bytes = shared_bytes

    def transformed(
        self,
        x: Tensor,
        y: Tensor | None = None,
        norm_weight: Tensor | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
        clip_low: Tensor | None = None,
        clip_high: Tensor | None = None,
        *,
        before: str = "",
        total: bool = False,
        eps: float = 0.0,
        offset: float = 0.0,
        bits: int = 0,
    ) -> Any:
        """As `functional.transformed`."""
        given = [t for t in (x, y, left, right) if t is not None]
        if not runs_by_kernel(*given) or (y is not None and y.shape != x.shape):
            return functional.transformed(
                x, y, norm_weight, left, right, clip_low, clip_high,
                before=before, total=total, eps=eps, offset=offset, bits=bits,
            )  # fmt: skip
        out, scales, whole = self.by_kernels(
            x, left, right, before=before, y=y, weight=norm_weight, eps=eps, offset=offset,
            clip_low=clip_low, clip_high=clip_high, bits=bits,
        )  # fmt: skip
        results = [x if whole is None else whole] if total else []
        results += [out] if scales is None else [out, scales]
        return tuple(results) if len(results) > 1 else out

    def by_kernels(
        self,
        x: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        *,
        before: str = "",
        y: Tensor | None = None,
        weight: Tensor | None = None,
        eps: float = 0.0,
        offset: float = 0.0,
        clip_low: Tensor | None = None,
        clip_high: Tensor | None = None,
        bits: int = 0,
        pairs: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `launch_transform`, by as many kernels as the shared memory asks for."""
        width = x.shape[-1]
        n1 = 0 if left is None else len(left)
        n2 = 0 if right is None else len(right)
        if not n1 and not n2:
            n1 = 1
        sizes = n1 or width // n2, n2 or width // n1
        if left is not None and right is not None and x.numel() >= MANY_TOKENS * width:
            found = launch_many(
                x, left, right, before=before, y=y, weight=weight, eps=eps, offset=offset,
                bits=bits, pairs=pairs, clip_low=clip_low, clip_high=clip_high,
            )  # fmt: skip
            if found is not None:
                return found
        own = _shared_bytes_of(x.device)
        room = self._shared_bytes if own is None else min(self._shared_bytes, own)
        if _fits(left, right, sizes, room):
            return launch_transform(
                x, left, right, sizes=sizes, before=before, y=y, weight=weight, eps=eps,
                offset=offset, bits=bits, pairs=pairs, clip_low=clip_low, clip_high=clip_high,
            )  # fmt: skip
        total: Tensor | None = None
        if before == "norm":
            whole, x = launch_norm(x, y, weight, eps, offset)
            total = None if y is None else whole
        elif before:
            assert y is not None
            x = launch_act_mul(x, y, before)
        if right is not None:
            x = (x.reshape(-1, sizes[1]) @ right).view(x.shape)
        if left is not None and not _fits(left, None, sizes, room):
            x = torch.matmul(left.t(), x.reshape(-1, *sizes)).view(x.shape)
            left = None
        if bits == 0 and left is None:
            return x, None, total
        if left is None:
            sizes = 1, width
        out, scales, _ = launch_transform(
            x, left, None, sizes=sizes, bits=bits, pairs=pairs, clip_low=clip_low,
            clip_high=clip_high,
        )  # fmt: skip
        return out, scales, total


def _fits(
    left: Tensor | None, right: Tensor | None, sizes: tuple[int, int], shared_bytes: int
) -> bool:
    n1 = None if left is None else len(left)
    n2 = None if right is None else len(right)
    return fits(n1, n2, *sizes, shared_bytes)
