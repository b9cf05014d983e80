"""Products of few tokens with weights of four bits, by a kernel in CUDA C++: on Hopper.

Layout letters: M tokens, K features in, N features out.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.runtime.compiled import (
    ACTIVATIONS,
    constants_of,
    kernel,
    launch,
    runs_compiled,
    say_instead,
)
from graphopt.runtime.driver import Function
from graphopt.runtime.packed_codes import PackedCodes
from graphopt.runtime.quantised_tiles import FewTiles, warps_for

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
    weight: PackedCodes,
    bias: Tensor | None,
    tiles: FewTiles,
    cores: int,
    x_scales: Tensor | None = None,
    act: str = "",
    norm: NormInFront | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """Return x weight^T + bias, [M, N] of the dtype of the weight's scales, and x + y of a norm.

    None where the kernel is not for these: norms of more than MOST_NORMED tokens, no tokens; and,
    which is said, another GPU, spans of fewer than 128 inputs, operands of several dtypes or
    shapes, rows that do not begin at multiples of what a thread reads at a time.

    The kernel starts before the one in front has ended, for which it waits when its first codes,
    which nothing writes, are on their way.

    Args:
        x: [M, K], the last axis contiguous: of that dtype, or int8 codes with `x_scales` fp32 [M].
        tiles: For as many tokens or more.
        cores: Of the GPU that they are for.
        act: An activation: give act(first) second, [M, N / 2], of both halves of the product.
    """
    tokens, (outputs, inputs) = len(x), weight.shape
    if not tokens or (norm is not None and tokens > MOST_NORMED):
        return None
    why = _refusal(x, weight, bias, norm)
    if why:
        say_instead(FILES[-1], why)
        return None
    dtype, codes = weight.scales.dtype, x.dtype == torch.int8
    sums = norm is not None and norm.y is not None
    form = Form(
        dtype == torch.bfloat16, codes, weight.zeros is not None, norm is not None, sums, act,
        warps_for(outputs, len(weight.codes), tiles, cores), tiles.row_tiles, tiles.ahead,
        -(-tokens // 8), 0 if len(weight.scales) == 1 else min(weight.group, SPAN),
    )  # fmt: skip
    shared = form.shared_bytes(tokens, inputs)
    function = _function_of(form, shared, x.device)
    if function is None:
        return None
    out = torch.empty(tokens, outputs // (2 if act else 1), dtype=dtype, device=x.device)
    total = torch.empty(x.shape, dtype=dtype, device=x.device) if sums else None
    operands = _operands(x, weight, bias, x_scales, out, norm, total)
    launch(function, (form.blocks(outputs),), 32 * form.warps, operands, x.device, early=True)
    return out, total


def _refusal(x: Tensor, weight: PackedCodes, bias: Tensor | None, norm: NormInFront | None) -> str:
    """Return why the kernel does not take these; empty where it does."""
    dtype = weight.scales.dtype
    if not runs_compiled(x.device):
        device = x.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        return f"{name} is no Hopper GPU"
    if weight.span != SPAN:
        return (
            f"a weight of {weight.shape[1]} inputs in groups of {weight.group} has no whole spans"
        )
    others = [bias] if norm is None else [bias, norm.y, norm.gain]
    kinds = {t.dtype for t in (x, *others) if t is not None} - {dtype}
    if kinds - ({torch.int8} if norm is None and x.dtype == torch.int8 else set()):
        return f"scales are {dtype}, and what is multiplied or added {', '.join(map(str, kinds))}"
    rows = [x]
    if norm is not None:
        rows += [] if norm.y is None else [norm.y]
        if norm.gain is not None and norm.gain.shape != x.shape[-1:]:
            return f"a gain is {tuple(norm.gain.shape)} for rows of {x.shape[-1]}"
        if any(t.shape != x.shape for t in rows):
            return f"a norm of {tuple(x.shape)} and {tuple(rows[-1].shape)}"
    read = 4 * x.element_size() if norm is None else _PIECE
    if any(t.data_ptr() % read or t.stride(0) * t.element_size() % read for t in rows):
        return f"rows do not begin at multiples of {read} bytes"
    return ""


class Form(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        bf16: Else fp16.
        codes: Whether x is int8.
        zeros: Whether the weight has zero points.
        norm, sums: Whether what is multiplied is a norm, and of a sum.
        act: The activation of a gate behind the product, or nothing.
        token_tiles: Of 8 tokens.
        group: Inputs that share a scale; 0 for all of a row.
    """

    bf16: bool
    codes: bool
    zeros: bool
    norm: bool
    sums: bool
    act: str
    warps: int
    row_tiles: int
    ahead: int
    token_tiles: int
    group: int

    @property
    def constants(self) -> dict[str, int]:
        """The macros of the kernel's source."""
        return {
            "BF16": self.bf16, "CODES": self.codes, "ZEROS": self.zeros, "NORM": self.norm,
            "SUM": self.sums, "GATED": self.act != "",
            "ACTIVATION": ACTIVATIONS.index(self.act) if self.act else 0, "ROUNDED": 0,
            "WARPS": self.warps, "ROW_TILES": self.row_tiles, "AHEAD": self.ahead,
            "TOKEN_TILES": self.token_tiles, "GROUP": self.group,
        }  # fmt: skip

    def shared_bytes(self, tokens: int, inputs: int) -> int:
        """Return the bytes of shared memory of a block: its warps' sums in fp32, and norms."""
        sums = 4 * self.warps * 16 * self.row_tiles * (8 * self.token_tiles + 1)
        return -(-sums // 16) * 16 + (2 * tokens * inputs if self.norm else 0)

    def blocks(self, outputs: int) -> int:
        """Return how many blocks of threads a product has."""
        rows = 16 * self.row_tiles
        return -(-(outputs // 2) // (rows // 2)) if self.act else -(-outputs // rows)


@functools.cache
def _function_of(form: Form, shared: int, device: torch.device) -> Function | None:
    return kernel(FILES, "hopper_packed_few", constants_of(form.constants), shared, device)


def _operands(
    x: Tensor,
    weight: PackedCodes,
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
