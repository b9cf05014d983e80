"""Products of few tokens with weights of four bits, by a kernel in CUDA C++: on Hopper.

Layout letters: M tokens, K features in, N features out.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.runtime.compiled import ACTIVATIONS, constants_of, kernel, launch, runs_compiled
from graphopt.runtime.fused import overlapping
from graphopt.runtime.quantised_tiles import FewTiles

FILES = ("activations.cu", "hopper_packed_few.cu")
SPAN = 128
"""Inputs whose codes lie together, in weights that the kernel reads."""


MOST_NORMED = 4
"""Tokens whose norms each block takes for itself: of more a kernel of their own takes less."""
_PIECE = 16
"""Bytes of a row that a thread reads at a time."""


class _Operands(ctypes.Structure):
    """As in the kernel's source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "x", "x_scales", "codes", "scales", "zeros", "bias", "out", "y", "gain", "sum",
        )),
        *((name, ctypes.c_int) for name in ("tokens", "outputs", "spans", "each")),
        ("x_stride", ctypes.c_longlong), ("y_stride", ctypes.c_longlong),
        ("eps", ctypes.c_float), ("offset", ctypes.c_float),
    )  # fmt: skip


@dataclass(frozen=True)
class NormInFront:
    """What a product reads is the norm of x, or of x + y, times `gain + offset`.

    Attributes:
        y: [M, K], the last axis contiguous.
        gain: [K].
    """

    y: Tensor | None
    gain: Tensor | None
    eps: float
    offset: float


def launch_few(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    tiles: FewTiles,
    x_scales: Tensor | None = None,
    act: str = "",
    norm: NormInFront | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """Return x weight^T + bias, [M, N] of the dtype of the weight's scales, and x + y of a norm.

    None where the kernel is not for these: another GPU, spans of fewer than 128 inputs, rows that
    do not begin at multiples of what a thread reads at a time, norms of many tokens.

    Args:
        x: [M, K], the last axis contiguous: of that dtype, or int8 codes with `x_scales` fp32 [M].
        weight: A `PackedCodes`.
        tiles: For as many tokens or more.
        act: An activation: give act(first) second, [M, N / 2], of both halves of the product.
    """
    dtype, codes = weight.scales.dtype, x.dtype == torch.int8
    if not runs_compiled(x.device) or weight.span != SPAN or not (codes or x.dtype == dtype):
        return None
    others = [bias] if norm is None else [bias, norm.y, norm.gain]
    if any(t is not None and t.dtype != dtype for t in others):
        return None
    tokens, outputs = len(x), weight.shape[0] // (2 if act else 1)
    if norm is not None and tokens > MOST_NORMED:
        return None
    read = 4 * x.element_size() if norm is None else _PIECE
    rows = [x] if norm is None or norm.y is None else [x, norm.y]
    if any(t.data_ptr() % read or t.stride(0) * t.element_size() % read for t in rows):
        return None
    constants = constants_of_few(weight, tiles, tokens, codes, act, norm)
    shared = shared_bytes(tiles, tokens, 0 if norm is None else x.shape[1])
    function = kernel(FILES, "packed_few", constants_of(constants), shared, x.device)
    if function is None:
        return None
    out = torch.empty(tokens, outputs, dtype=dtype, device=x.device)
    total = None
    if norm is not None and norm.y is not None:
        total = torch.empty(x.shape, dtype=dtype, device=x.device)
    operands = _operands(x, weight, bias, x_scales, out, norm, total)
    early = overlapping(x.device)["OVERLAP"]
    grid = (_blocks(tiles, weight, act),)
    launch(function, grid, 32 * tiles.warps, operands, x.device, early)
    return out, total


def constants_of_few(
    weight: Any,
    tiles: FewTiles,
    tokens: int,
    codes: bool = False,
    act: str = "",
    norm: NormInFront | None = None,
) -> dict[str, int]:
    """Return the macros of the kernel's source; see `launch_few`."""
    return {
        "BF16": weight.scales.dtype == torch.bfloat16,
        "CODES": codes,
        "ZEROS": weight.zeros is not None,
        "NORM": norm is not None,
        "SUM": norm is not None and norm.y is not None,
        "GATED": act != "",
        "ACTIVATION": ACTIVATIONS.index(act) if act else 0,
        "WARPS": tiles.warps,
        "ROW_TILES": tiles.row_tiles,
        "AHEAD": tiles.ahead,
        "TOKEN_TILES": -(-tokens // 8),
        "GROUP": 0 if len(weight.scales) == 1 else min(weight.group, SPAN),
    }


def shared_bytes(tiles: FewTiles, tokens: int, normed: int = 0) -> int:
    """Return the bytes of shared memory of a block: its warps' sums in fp32, and norms of tokens.

    Args:
        normed: Inputs whose norms are taken; 0 for none.
    """
    sums = 4 * tiles.warps * 16 * tiles.row_tiles * (8 * -(-tokens // 8) + 1)
    return -(-sums // 16) * 16 + 2 * tokens * normed


def _blocks(tiles: FewTiles, weight: Any, act: str) -> int:
    """Return how many blocks of threads a product has."""
    outputs, rows = weight.shape[0], 16 * tiles.row_tiles
    return -(-outputs // rows) if not act else -(-(outputs // 2) // (rows // 2))


def _operands(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    x_scales: Tensor | None,
    out: Tensor,
    norm: NormInFront | None,
    total: Tensor | None,
) -> ctypes.Structure:
    y, gain = (None, None) if norm is None else (norm.y, norm.gain)
    given = (
        x, x_scales, weight.codes, weight.scales, weight.zeros, bias, out, y, gain, total
    )  # fmt: skip
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in given)
    return _Operands(
        *addresses, len(x), weight.shape[0], len(weight.codes), max(1, weight.group // SPAN),
        x.stride(0), 0 if y is None else y.stride(0),
        0.0 if norm is None else norm.eps, 0.0 if norm is None else norm.offset,
    )  # fmt: skip
