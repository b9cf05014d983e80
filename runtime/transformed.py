"""Kronecker transforms of activations on a GPU, and their rounding to codes, in Triton.

One kernel does a norm or a gate, the transform and the rounding of a token where both factors and
the token fit into the shared memory of a core. Of larger ones the right product is cuBLAS's, and
of still larger ones the left one as well (FlatQuant, arXiv 2410.09426, section 3.3 and appendix
B.3).

Layout letters: N1, N2 the sizes of the left and the right factor; a token has N1 N2 features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.runtime.fused import launch_act_mul, launch_norm, strides_of_rows

LARGEST_TILE = 32768
"""Elements of a token that a program holds at most: 64 numbers of each of its 512 threads."""


def power(size: int) -> int:
    """Return the power of two from a size up; but for 1 at least 16, as matrix units multiply."""
    return 1 if size == 1 else max(16, 1 << (size - 1).bit_length())


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


@dataclass(frozen=True)
class Codes:
    """Activations rounded to integers.

    Attributes:
        codes: int8 [..., K], or uint8 [..., K / 2] with two of four bits in a byte, the one of
            even place in the low bits.
        scales: fp32 [...]: what the codes of a token are times.
    """

    codes: Tensor
    scales: Tensor


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
        programs: How many programs take turns; by default one a token.
        warps: Of a program; by default one for each 1,024 elements of a token.
        stages: Tokens that a program reads ahead.

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
    b1, b2 = power(n1), power(n2)
    given = {
        f"{name}_stride_{axis}": stride
        for name, row in (("x", strides[0]), ("y", strides[-1]))
        for axis, stride in enumerate(row)
    }
    kernel[(min(tokens, programs or tokens),)](
        tensors[0], None if y is None else tensors[1], weight,
        None if left is None else left.contiguous(), None if right is None else right.contiguous(),
        clip_low, clip_high,
        total, out, scales, tokens, shape[1], shape[2],
        **given, eps=float(eps), offset=float(offset),
        N1=n1, N2=n2, B1=b1, B2=b2, BEFORE=before, BITS=bits, PAIRS=pairs,
        num_warps=warps or min(16, max(1, b1 * b2 // 1024)), num_stages=stages,
    )  # fmt: skip
    return out, scales, total


def transformed(
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    shared_bytes: int,
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
    n1 = len(left) if left is not None else 0
    n2 = len(right) if right is not None else 0
    if not n1 and not n2:
        n1, n2 = 1, width
    n1, n2 = n1 or width // n2, n2 or width // n1
    sides = (n1 if left is not None else None, n2 if right is not None else None)
    behind = {"clip_low": clip_low, "clip_high": clip_high, "bits": bits, "pairs": pairs}
    front = {"before": before, "y": y, "weight": weight, "eps": eps, "offset": offset}
    if fits(*sides, n1, n2, shared_bytes):
        return launch_transform(x, left, right, sizes=(n1, n2), **front, **behind)  # type: ignore[arg-type]
    total: Tensor | None = None
    if before == "norm":
        total, x = launch_norm(x, y, weight, eps, offset)
        total = None if y is None else total
    elif before:
        assert y is not None
        x = launch_act_mul(x, y, before)
    if right is not None:
        x = (x.reshape(-1, n2) @ right).view(x.shape)
    if left is not None and not fits(n1, None, n1, n2, shared_bytes):
        x = torch.matmul(left.t(), x.reshape(-1, n1, n2)).view(x.shape)
        left = None
    if bits == 0 and left is None:
        return x, None, total
    out, scales, _ = launch_transform(x, left, None, sizes=(n1, n2), **behind)  # type: ignore[arg-type]
    return out, scales, total
