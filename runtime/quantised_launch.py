"""Launches of the kernels in Triton for weights of few bits: products, and weights unpacked.

Layout letters: M tokens, K features in, N features out.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from graphopt.runtime.fitting_tiles import with_fewer_stages
from graphopt.runtime.fused import overlapping
from graphopt.runtime.packed_codes import PackedCodes
from graphopt.runtime.quantised_tiles import IntegerTiles, PackedTiles, splits_for


def launch_packed(
    x: Tensor,
    weight: PackedCodes,
    bias: Tensor | None,
    tiles: PackedTiles,
    cores: int,
    x_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    integer: bool = False,
) -> Tensor:
    """Return x weight^T + bias, [M, N].

    Args:
        x: [M, K], the last axis contiguous: of 16 bits, or int8 codes with `x_scales` fp32 [M].
        dtype: Of the result; by default that of `x`.
        integer: Multiply codes as int8, instead of converting them; the weight has no zeros.
    """
    from graphopt.runtime.kernels.packed_linear import packed_few, packed_linear

    tokens = len(x)
    outputs, _ = weight.shape
    spans = len(weight.codes)
    few = tiles.unroll > 0
    splits = splits_for(outputs, tokens, spans, tiles, cores)
    if tokens > tiles.columns:
        splits = 1  # a weight's counters are for one column of tiles
    out = torch.empty(tokens, outputs, dtype=dtype or x.dtype, device=x.device)
    part = None
    if splits > 1:
        part = torch.empty(splits, tokens, outputs, dtype=torch.float32, device=x.device)
    grid = (-(-outputs // tiles.rows), splits, -(-tokens // tiles.columns))
    more: dict[str, Any] = {"INTEGER": integer}
    if few:
        more = {"UNROLL": tiles.unroll, **overlapping(x.device)}
    kernel = packed_few if few else packed_linear

    def start(stages: int) -> None:
        kernel[grid](
            x, x_scales, weight.codes, weight.scales, weight.zeros, bias, out, part,
            weight.arrived, tokens, outputs, spans, x.stride(0),
            SPAN=weight.span, GROUP=weight.group if len(weight.scales) > 1 else 0,
            BLOCK_M=tiles.columns, BLOCK_N=tiles.rows, SPLITS=splits, WORDS=x.is_cuda,
            num_warps=tiles.warps, num_stages=stages, **more,
        )  # fmt: skip

    with_fewer_stages(("packed", tiles, weight.span, integer, x.device), tiles.stages, start)
    return out


def launch_unpack(weight: PackedCodes, dtype: torch.dtype) -> Tensor:
    """Return the matrix [N, K] that a weight stands for; in int8 its numbers, times 16."""
    from graphopt.runtime.kernels.packed_linear import unpack_weight as kernel

    outputs, inputs = weight.shape
    out = torch.empty(outputs, inputs, dtype=dtype, device=weight.codes.device)
    spans, rows = len(weight.codes), 64
    kernel[(spans, -(-outputs // rows))](
        weight.codes, weight.scales, weight.zeros, out, outputs, spans,
        SPAN=weight.span, GROUP=weight.group, BLOCK_N=rows, WORDS=weight.codes.is_cuda, num_warps=4,
    )  # fmt: skip
    return out


@functools.cache
def _copies_tiles(device: torch.device) -> bool:
    """Return whether a GPU copies tiles of a tensor by itself (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _described(matrix: Tensor, rows: int, columns: int) -> Any:
    """Return the tensor descriptor of tiles of int8; None where the device copies none of it."""
    if not _copies_tiles(matrix.device) or matrix.data_ptr() % 16 or matrix.stride(0) % 16:
        return None
    if matrix.shape[0] < rows or matrix.shape[1] < columns:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def launch_integer(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiles: IntegerTiles,
    cores: int,
    unit: float = 1.0,
) -> Tensor:
    """Return (x weight^T) * unit * x_scales * scales + bias, [M, N] of `dtype`.

    Args:
        x: int8 [M, K], the last axis contiguous.
        x_scales: fp32 [M].
        weight: int8 [N, K], contiguous.
        scales: [N].
    """
    from graphopt.runtime.kernels.integer_linear import integer_linear as kernel

    tokens, inputs = x.shape
    outputs = len(weight)
    out = torch.empty(tokens, outputs, dtype=dtype, device=x.device)
    x_tiles = _described(x, tiles.rows, tiles.depth)
    weight_tiles = _described(weight, tiles.columns, tiles.depth)
    if x_tiles is None or weight_tiles is None:
        x_tiles = weight_tiles = None
    count = -(-tokens // tiles.rows) * -(-outputs // tiles.columns)
    programs = min(cores, count) if tiles.persistent else count

    def start(stages: int) -> None:
        kernel[(programs,)](
            x, x_tiles, weight, weight_tiles, x_scales, scales, bias, out,
            tokens, outputs, inputs, x.stride(0), unit,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, GROUP=tiles.group,
            WHOLE=inputs % tiles.depth == 0, FLATTEN=tiles.persistent,
            num_warps=tiles.warps, num_stages=stages,
        )  # fmt: skip

    with_fewer_stages(("integer", tiles, x.device), tiles.stages, start)
    return out
