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

FILES = ("activations.cu", "packed_front.cu", "hopper_packed_few.cu")
SPAN = 128
"""Inputs whose codes lie together, in weights that the kernel reads."""
MOST_HELD = 4
"""Tokens whose norms, or transforms, each block takes for itself: of more a kernel of their own
takes less."""
MOST_ROWS = 128
"""Of a token that is transformed as a matrix."""
SHARED_BYTES = 232448
"""Of a block: CUDA C++ Programming Guide, compute capability 9.0."""
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
        ("left", ctypes.c_void_p), ("right", ctypes.c_void_p),
    )  # fmt: skip


@dataclass(frozen=True)
class InFront:
    """What is done to x before it is multiplied: a norm or a gate, a Kronecker transform, or both.

    Attributes:
        y: [M, K], the last axis contiguous: added in front of a norm, or the gate's second half.
        gain: Of the norm, [K]: it is times `gain + offset`.
        before: `norm`; the name of an activation: act(x) y; or nothing.
        left, right: The factors [N1, N1] and [N2, N2], contiguous; with one alone a token is
            divided by its size. See `functional.kronecker`.
    """

    y: Tensor | None
    gain: Tensor | None
    eps: float
    offset: float
    before: str = "norm"
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def sums(self) -> bool:
        """Whether the norm is of a sum, which is written."""
        return self.before == "norm" and self.y is not None

    def sizes(self, inputs: int) -> tuple[int, int]:
        """Return (N1, N2) of a token of so many features; zeros without a transform."""
        n1 = 0 if self.left is None else len(self.left)
        n2 = 0 if self.right is None else len(self.right)
        if not n1 and not n2:
            return 0, 0
        return n1 or inputs // n2, n2 or inputs // n1


def launch_few(
    x: Tensor,
    weight: PackedCodes,
    bias: Tensor | None,
    tiles: FewTiles,
    cores: int,
    x_scales: Tensor | None = None,
    act: str = "",
    front: InFront | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """Return x weight^T + bias, [M, N] of the dtype of the weight's scales, and x + y of a norm.

    None where the kernel is not for these: more than MOST_HELD tokens with something in front, no
    tokens; and, which is said, another GPU, spans of fewer than 128 inputs, operands of several
    dtypes or shapes, rows that do not begin at multiples of what a thread reads at a time, factors
    of other sizes than matrix units read, or that a block has no shared memory for.

    The kernel starts before the one in front has ended, for which it waits when its first codes,
    which nothing writes, are on their way.

    Args:
        x: [M, K], the last axis contiguous: of that dtype, or int8 codes with `x_scales` fp32 [M].
        tiles: For as many tokens or more.
        cores: Of the GPU that they are for.
        act: An activation: give act(first) second, [M, N / 2], of both halves of the product.
    """
    tokens, (outputs, inputs) = len(x), weight.shape
    if not tokens or (front is not None and tokens > MOST_HELD):
        return None
    why = _refusal(x, weight, bias, front, act)
    if why:
        say_instead(FILES[-1], why)
        return None
    dtype, codes = weight.scales.dtype, x.dtype == torch.int8
    sums = front is not None and front.sums
    form = Form(
        dtype == torch.bfloat16, codes, weight.zeros is not None,
        front is not None and front.before == "norm", sums, act,
        warps_for(outputs, len(weight.codes), tiles, cores), tiles.row_tiles, tiles.ahead,
        -(-tokens // 8), 0 if len(weight.scales) == 1 else min(weight.group, SPAN),
        *(() if front is None else _form_of(front, inputs)),
    )._replace(near=tiles.near)  # fmt: skip
    shared = form.shared_bytes(tokens, inputs)
    if shared > SHARED_BYTES:
        say_instead(FILES[-1], f"a transform of {form.n1} x {form.n2} takes {shared} bytes")
        return None
    function = _function_of(form, shared, x.device)
    if function is None:
        return None
    out = torch.empty(tokens, outputs // (2 if act else 1), dtype=dtype, device=x.device)
    total = torch.empty(x.shape, dtype=dtype, device=x.device) if sums else None
    operands = _operands(x, weight, bias, x_scales, out, front, total)
    launch(function, (form.blocks(outputs),), 32 * form.warps, operands, x.device, early=True)
    return out, total


def _form_of(front: InFront, inputs: int) -> tuple[str, int, int, bool, bool]:
    """Return the fields of a `Form` from `gate` on."""
    gate = "" if front.before == "norm" else front.before
    sizes = front.sizes(inputs)
    return (gate, *sizes, front.left is not None, front.right is not None)


def _refusal(
    x: Tensor, weight: PackedCodes, bias: Tensor | None, front: InFront | None, act: str = ""
) -> str:
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
    others = [bias]
    if front is not None:
        others += [front.y, front.gain, front.left, front.right]
    kinds = {t.dtype for t in (x, *others) if t is not None} - {dtype}
    if kinds - ({torch.int8} if front is None and x.dtype == torch.int8 else set()):
        return f"scales are {dtype}, and what is multiplied or added {', '.join(map(str, kinds))}"
    rows = [x]
    if front is not None:
        rows += [] if front.y is None else [front.y]
        if front.gain is not None and front.gain.shape != x.shape[-1:]:
            return f"a gain is {tuple(front.gain.shape)} for rows of {x.shape[-1]}"
        if any(t.shape != x.shape for t in rows):
            return f"a norm or a gate of {tuple(x.shape)} and {tuple(rows[-1].shape)}"
    read = 4 * x.element_size() if front is None else _PIECE
    if any(t.data_ptr() % read or t.stride(0) * t.element_size() % read for t in rows):
        return f"rows do not begin at multiples of {read} bytes"
    return "" if front is None else _refusal_of_transform(front, x.shape[-1], act)


def _refusal_of_transform(front: InFront, inputs: int, act: str) -> str:
    factors = [t for t in (front.left, front.right) if t is not None]
    if not factors:
        return "" if front.before == "norm" else "a gate in front of a product has no transform"
    n1, n2 = front.sizes(inputs)
    if not takes_factors(n1, n2) or n1 * n2 != inputs:
        return f"{inputs} features are transformed as {n1} x {n2}"
    if act and front.before not in ("", "norm", act):
        return f"{front.before} in front of a product and {act} behind it"
    if any(not t.is_contiguous() or t.data_ptr() % _PIECE for t in factors):
        return f"factors do not lie row by row from a multiple of {_PIECE} bytes on"
    return ""


def takes_factors(n1: int, n2: int) -> bool:
    """Return whether blocks transform tokens [N1, N2]: pieces of rows are copied and written.

    A strip of 16 columns is kept in registers as a whole, which is why N1 has a bound.
    """
    return n1 % 2 == 0 and n2 % 8 == 0 and 0 < n1 <= MOST_ROWS


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
        gate: The activation of a gate in front of the product, or nothing.
        n1, n2: What a token is transformed as; 0 where it is not.
        left, right: Which factors there are.
        near: Spans of a warp behind `ahead` that come into the second cache early.
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
    gate: str = ""
    n1: int = 0
    n2: int = 0
    left: bool = False
    right: bool = False
    near: int = 0

    @property
    def constants(self) -> dict[str, int]:
        """The macros of the kernel's source."""
        name = self.act or self.gate
        return {
            "BF16": self.bf16, "CODES": self.codes, "ZEROS": self.zeros, "NORM": self.norm,
            "SUM": self.sums, "GATED": self.act != "",
            "ACTIVATION": ACTIVATIONS.index(name) if name else 0, "ROUNDED": 0,
            "WARPS": self.warps, "ROW_TILES": self.row_tiles, "AHEAD": self.ahead,
            "TOKEN_TILES": self.token_tiles, "GROUP": self.group, "GATE": self.gate != "",
            "NEAR": self.near, "N1": self.n1, "N2": self.n2, "LEFT": self.left, "RIGHT": self.right,
        }  # fmt: skip

    def shared_bytes(self, tokens: int, inputs: int) -> int:
        """Return the bytes of shared memory of a block: its warps' sums in fp32, and tokens."""
        sums = 4 * self.warps * 16 * self.row_tiles * (8 * self.token_tiles + 1)
        held = 2 * tokens * inputs if self.norm else 0
        if self.n1:
            held = transform_bytes(self.n1, self.n2, self.left, self.right, tokens)
        return -(-sums // 16) * 16 + held

    def blocks(self, outputs: int) -> int:
        """Return how many blocks of threads a product has."""
        rows = 16 * self.row_tiles
        return -(-(outputs // 2) // (rows // 2)) if self.act else -(-outputs // rows)


def transform_bytes(n1: int, n2: int, left: bool, right: bool, tokens: int) -> int:
    """Return the bytes of shared memory of a transform: factors, tokens, and what they become.

    Rows have 16 bytes behind them, and results 16 behind every 64 features: see the kernel.
    """
    rows_1, rows_2 = -(-n1 // 16) * 16, -(-n2 // 16) * 16
    factors = left * rows_1 * (rows_1 + 8) + right * rows_2 * (rows_2 + 8)
    return 2 * (factors + tokens * (rows_1 * (rows_2 + 8) + n1 * n2 // 64 * 72))


@functools.cache
def _function_of(form: Form, shared: int, device: torch.device) -> Function | None:
    return kernel(FILES, "hopper_packed_few", constants_of(form.constants), shared, device)


def _operands(
    x: Tensor,
    weight: PackedCodes,
    bias: Tensor | None,
    x_scales: Tensor | None,
    out: Tensor,
    front: InFront | None,
    total: Tensor | None,
) -> ctypes.Structure:
    y, gain, left, right, eps, offset = (
        (None, None, None, None, 0.0, 0.0)
        if front is None
        else (front.y, front.gain, front.left, front.right, front.eps, front.offset)
    )
    given = (x, x_scales, weight.codes, weight.scales, weight.zeros, bias, out, y, gain, total)
    addresses, factors = (
        (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        for tensors in (given, (left, right))
    )
    return _Operands(
        *addresses, len(x), weight.shape[0], len(weight.codes), max(1, weight.group // SPAN),
        x.stride(0), 0 if y is None else y.stride(0), eps, offset, *factors,
    )  # fmt: skip
