"""Norms, rotary positions, gated activations and cache writes: one kernel each, in Triton.

Functions named as one of `graphopt.ir.functional` stand in for it: 16-bit tensors on a GPU go to a
kernel, and whatever else there is (a CPU, fp32, a gain of two axes, a machine without Triton) goes
to `functional`. A kernel computes in fp32 and rounds once, where it writes.

Layout letters: B batch, S new tokens, T room of a cache, H query heads, G key heads, D head size,
N features.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from graphopt.ir import functional, kv_memory
from graphopt.runtime.fitting_tiles import has_triton

HALF = (torch.float16, torch.bfloat16)
OLDEST = (8, 0)
"""Compute capability from which Triton supports a GPU."""
OVERLAPS = (9, 0)
"""Compute capability from which kernels may start before the one in front has ended."""
MOST_TRANSFORMED = 16
"""Tokens whose heads the kernel of rotations multiplies by a factor: of more cuBLAS takes less."""
BLOCK = 1024
"""Elements a program of four warps is given, where a row or the work does not decide it."""


def power_of_two(size: int) -> int:
    """Return the least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def warps_for(elements: int) -> int:
    """Return the warps of a program that has so many elements at once."""
    return min(16, max(1, elements // 256))


@functools.cache
def _triton_runs() -> bool:
    """Return whether the GPU and what is installed can run the kernels; say why they cannot."""
    if not has_triton():
        why = "Triton is not installed (pip install triton)"
    elif torch.cuda.get_device_capability() < OLDEST:
        why = f"Triton does not support {torch.cuda.get_device_name()}"
    else:
        return True
    warnings.warn(f"{why}: norms, rotary positions and gates run in plain torch", stacklevel=4)
    return False


def overlapping(device: torch.device) -> dict[str, bool]:
    """Return options of a launch: whether a kernel starts before the one in front has ended.

    From Hopper on a GPU does that (programmatic dependent launch): it saves most of a launch, half
    a microsecond. Such a kernel waits inside, before it reads what a kernel writes and before it
    writes: for the end of the one in front, whose writes are seen then. Since every block of every
    kernel that starts early waits so, that one has not ended before all in front of it have.
    """
    if device.type == "cuda" and _launches_early(device):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@functools.cache
def _launches_early(device: torch.device) -> bool:
    # AMD's GPUs have other numbers.
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= OVERLAPS


def runs_by_kernel(*tensors: Tensor) -> bool:
    """Return whether kernels take these: 16 bits, all of one dtype, on a GPU, not empty."""
    kind = tensors[0].dtype
    return (
        kind in HALF
        and all(t.is_cuda and t.dtype == kind and t.numel() > 0 for t in tensors)
        and _triton_runs()
    )


def strides_of_rows(*tensors: Tensor) -> tuple[list[Tensor], list[int], list[list[int]]]:
    """Return tensors of one shape, and the sizes and strides of three axes that walk their rows.

    One whose last axis is not contiguous, or whose rows need more axes, is copied.
    """
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for axis, size in enumerate(tensors[0].shape[:-1]):
        steps = [t.stride(axis) for t in tensors]
        if size == 1:
            continue
        if sizes and all(s[-1] == size * step for s, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
            continue
        sizes.append(size)
        for s, step in zip(strides, steps, strict=True):
            s.append(step)
    if len(sizes) > 3 or any(t.stride(-1) != 1 for t in tensors):
        return strides_of_rows(*(t.clone(memory_format=torch.contiguous_format) for t in tensors))
    pad = 3 - len(sizes)
    return list(tensors), [1] * pad + sizes, [[0] * pad + s for s in strides]


def named_strides(name: str, strides: list[int]) -> dict[str, int]:
    """Return strides of three axes as arguments of a kernel."""
    return {f"{name}_stride_{axis}": stride for axis, stride in enumerate(strides)}


# Launching ----------------------------------------------------------------------------------------


def launch_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x + y and its root-mean-square norm; without `y`, `x` and its norm.

    Args:
        x, y: [..., N] of any strides.
        weight: [N].
        dtype: Of the norm; by default that of `x`.

    Returns:
        [..., N], the sum in the dtype of `x`.
    """
    from graphopt.runtime.kernels.block import rms_norm as kernel

    width = x.shape[-1]
    tensors, sizes, strides = strides_of_rows(x) if y is None else strides_of_rows(x, y)
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    total = x if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, block = math.prod(sizes), power_of_two(width)
    held = max(1, min(BLOCK // block, power_of_two(rows)))
    kernel[(-(-rows // held),)](
        tensors[0], None if y is None else tensors[1], weight, None if y is None else total, out,
        rows, sizes[1], sizes[2],
        **named_strides("x", strides[0]), **named_strides("y", strides[-1]),
        eps=float(eps), offset=float(offset),
        N=width, ROWS=held, BLOCK=block, num_warps=warps_for(held * block), **overlapping(x.device),
    )  # fmt: skip
    return total, out


def launch_rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotate the heads of `q`, and in the same launch those of `k`.

    Args:
        q, k: [B, H, S, D] and [B, G, S, D], the last axis contiguous.
        cos, sin: [B, S, R/2], or 1 in place of B or S; the last axis contiguous.
        factors: What the heads of both are multiplied by when they are rotated and rounded, [D, D]
            each, contiguous.

    Returns:
        [B, H, S, D] and [B, G, S, D], tokens first in memory.
    """
    from graphopt.runtime.kernels.block import rope as kernel
    from graphopt.runtime.kernels.block import rope_and_transform

    batch, heads, count, width = q.shape
    half = cos.shape[-1]
    given = [q] if k is None else [q, k]
    outs = [
        torch.empty((batch, count, t.shape[1], width), dtype=q.dtype, device=q.device)
        for t in given
    ]
    names = {
        f"{name}_stride_{axis}": tensor.stride(i)
        for name, tensor in (("q", q), ("k", given[-1]))
        for i, axis in enumerate("bhs")
    }
    for name, table in (("cos", cos), ("sin", sin)):
        wide = table.expand(batch, count, half)
        names |= {f"{name}_stride_b": wide.stride(0), f"{name}_stride_s": wide.stride(1)}
    most, block = power_of_two(max(t.shape[1] for t in given)), power_of_two(half)
    tail = power_of_two(max(width - 2 * half, 1))
    tensors = (q, k, outs[0], None if k is None else outs[1], cos, sin)
    sizes = (count, heads, given[-1].shape[1])
    options = {"D": width, "HALF": half, "INTERLEAVED": interleaved, **overlapping(q.device)}
    grid = batch * count, len(given)
    if factors is None:
        kernel[grid](
            *tensors, *sizes, **names, **options,
            HEADS=most, BLOCK=block, TAIL=tail, num_warps=warps_for(most * block),
        )  # fmt: skip
    else:
        # Matrix units multiply sixteen of a kind.
        most, block, tail = (max(16, size) for size in (most, block, tail))
        rope_and_transform[grid](
            *tensors, *factors, *sizes, **names, **options,
            HEADS=most, BLOCK=block, TAIL=tail, COLUMNS=max(16, power_of_two(width)),
            num_warps=4 if width <= 64 else 8,
        )  # fmt: skip
    views = [out.transpose(1, 2) for out in outs]
    return views[0], None if k is None else views[1]


def launch_act_mul(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """Return act(gate) * up; both [..., N] of any strides."""
    from graphopt.runtime.kernels.block import act_mul as kernel

    width = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    tensors, sizes, strides = strides_of_rows(gate, up)
    block = min(BLOCK, power_of_two(width))
    kernel[(math.prod(sizes), -(-width // block))](
        *tensors, out, sizes[1], sizes[2],
        **named_strides("gate", strides[0]), **named_strides("up", strides[1]),
        N=width, ACT=act, BLOCK=block, num_warps=warps_for(block), **overlapping(gate.device),
    )  # fmt: skip
    return out


def launch_append(
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    seq_lens: Tensor,
    new_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    ring: bool = False,
    bits: int = 16,
) -> Tensor:
    """Write keys and values behind those of each row; return `seq_lens` and the new, int32 [B].

    Arguments are those of `kv_memory.append_kv`, the last axis of tensors contiguous.
    """
    from graphopt.runtime.kernels.block import append_kv
    from graphopt.runtime.kernels.packed_kv import append_packed_kv

    batch, heads, count, _ = k.shape
    total = torch.empty(batch, dtype=torch.int32, device=k.device)
    arguments: dict[str, Any] = {
        f"{name}_stride_{axis}": tensor.stride(i)
        for name, tensor in (("k", k), ("v", v))
        for i, axis in enumerate("bhs")
    }
    arguments |= {
        f"cache_{name}_stride_{axis}": tensor.stride(i)
        for name, tensor in (("k", cache_k), ("v", cache_v))
        for i, axis in enumerate("bht")
    }
    page = 0 if block_table is None else cache_k.shape[2]
    width = 0 if block_table is None else block_table.shape[1]
    columns = [power_of_two(tensor.shape[3] * min(bits, 8) // 8) for tensor in (k, v)]
    arguments |= {
        "K_DIM": k.shape[3], "V_DIM": v.shape[3], "HEADS": power_of_two(heads),
        "BLOCK_K": columns[0], "BLOCK_V": columns[1], "RING": ring, "PAGE": page,
        "num_warps": min(4, warps_for(power_of_two(heads) * max(columns))), **overlapping(k.device),
    }  # fmt: skip
    tensors = (k, v, cache_k, cache_v, seq_lens, new_lens, block_table, total)
    sizes = (
        count, heads, page * width if page else cache_k.shape[2],
        seq_lens.expand(batch).stride(0), width,
    )  # fmt: skip
    if bits == 16:
        append_kv[(batch * count,)](*tensors, *sizes, **arguments)
    else:
        append_packed_kv[(batch * count, 2)](*tensors, *sizes, **arguments, BITS=bits)
    return total


# In place of `functional` -------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """As `functional.rms_norm`."""
    if runs_by_kernel(x) and _is_gain(weight, x):
        return launch_norm(x, None, weight, eps, offset)[1]
    return functional.rms_norm(x, weight, eps, offset)


def add_rms_norm(
    x: Tensor, y: Tensor | None, weight: Tensor | None, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `functional.add_rms_norm`."""
    given = [x] if y is None else [x, y]
    if runs_by_kernel(*given) and given[-1].shape == x.shape and _is_gain(weight, x):
        return launch_norm(x, y, weight, eps, offset)
    return functional.add_rms_norm(x, y, weight, eps, offset)


def _is_gain(weight: Tensor | None, x: Tensor) -> bool:
    return weight is None or (
        weight.shape == x.shape[-1:] and weight.is_contiguous() and weight.dtype != torch.float64
    )


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, heads_first: bool = True
) -> Tensor:
    """As `functional.rope`; the tables stay in fp32."""
    if not (runs_by_kernel(x) and _rotatable(cos, sin, x)):
        return functional.rope(x, cos, sin, interleaved, heads_first)
    turned = launch_rope(x if heads_first else x.transpose(1, 2), None, cos, sin, interleaved)[0]
    return turned if heads_first else turned.transpose(1, 2)


def rope_pair(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_right: Tensor | None = None,
    k_right: Tensor | None = None,
    interleaved: bool = False,
    heads_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `functional.rope_pair`; the tables stay in fp32."""
    given = [t for t in (q, k, q_right, k_right) if t is not None]
    if not (runs_by_kernel(*given) and q.shape[-1] == k.shape[-1] and _rotatable(cos, sin, q, k)):
        return functional.rope_pair(q, k, cos, sin, q_right, k_right, interleaved, heads_first)
    if not heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    factors = None
    if q_right is not None and k_right is not None:
        # A kernel reads them before one in front, which may copy one, has ended.
        whole = q_right.is_contiguous() and k_right.is_contiguous()
        if whole and q.shape[0] * q.shape[2] <= MOST_TRANSFORMED:
            factors = q_right, k_right
    a, b = launch_rope(q, k, cos, sin, interleaved, factors)
    assert b is not None
    if factors is None and q_right is not None and k_right is not None:
        a, b = a @ q_right, b @ k_right
    return (a, b) if heads_first else (a.transpose(1, 2), b.transpose(1, 2))


def _rotatable(*tensors: Tensor) -> bool:
    return all(t.stride(-1) == 1 and t.dtype != torch.float64 for t in tensors)


def act_mul(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """As `functional.act_mul`."""
    if runs_by_kernel(gate, up) and gate.shape == up.shape:
        return launch_act_mul(gate, up, act)
    return functional.act_mul(gate, up, act)


def append_kv(
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    seq_lens: Tensor,
    *,
    new_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    ring: bool = False,
    bits: int = 16,
) -> Tensor:
    """As `kv_memory.append_kv`."""
    tensors = (k, v, cache_k, cache_v)
    own = tensors if bits == 16 else (k, v)
    if runs_by_kernel(*own) and _rotatable(*tensors):
        return launch_append(*tensors, seq_lens, new_lens, block_table, ring, bits)
    return kv_memory.append_kv(
        *tensors, seq_lens, new_lens=new_lens, block_table=block_table, ring=ring, bits=bits
    )
