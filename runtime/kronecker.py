"""Kronecker transforms of many tokens in bf16, by a kernel in CUDA C++: on Hopper.

Layout letters: N1, N2 the sizes of the left and the right factor; a token has N1 N2 features.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from dataclasses import dataclass, replace

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
from graphopt.runtime.fused import overlapping
from graphopt.runtime.wgmma import product

FILES = ("activations.cu", "hopper_transform.cu")
SHARED_BYTES, REGISTERS, THREADS = 233472, 65536, 2048
"""Of a core: CUDA C++ Programming Guide, compute capability 9.0."""
RESERVED = 1024
"""Bytes of shared memory that a block takes beside its own."""
SPILLED = 12
"""Registers of a thread that may lie in memory where a core has room for two blocks so."""
MOST_BLOCKS = 6
LARGEST = 256
"""The most rows of a right side of `wgmma`."""


@dataclass(frozen=True)
class Cut:
    """How the kernel works on tokens [N1, N2], and what it does with them.

    Attributes:
        front: What stands in front: nothing, a norm or a gate.
        sums: Whether the norm is of a sum, which is written.
        offset: Of the norm's gain, 0 or 1.
        act: The gate's activation.
        bits: Of codes, 0 for values.
        pairs: Whether two codes are put into a byte.
        clipped: Whether a token's range is times clips.
        over: Whether results are put together in the memory that the products read a token from.
        blocks: Of a core.
        stages: Tokens of a block that are on their way or being read.
    """

    n1: int
    n2: int
    front: int
    sums: bool = False
    offset: int = 0
    act: str = ""
    bits: int = 0
    pairs: bool = False
    clipped: bool = False
    over: bool = False
    blocks: int = 1
    stages: int = 1

    @property
    def threads(self) -> int:
        """Of a block: a warpgroup for each 64 columns."""
        return 128 * -(-self.n2 // 64)

    @property
    def constants(self) -> dict[str, int]:
        """The macros of the kernel's source."""
        return {
            "N1": self.n1, "N2": self.n2, "FRONT": self.front, "SUM": self.sums,
            "OFFSET": self.offset, "BITS": self.bits, "PAIRS": self.pairs,
            "CLIPPED": self.clipped,
            "ACTIVATION": ACTIVATIONS.index(self.act) if self.act else 0,
            "ROUNDED": self.bits > 0, "OVER": self.over,
            "BLOCKS": self.blocks, "STAGES": self.stages,
        }  # fmt: skip

    @property
    def shared_bytes(self) -> int:
        """What a block takes of the shared memory."""
        width, rows = self.n1 * self.n2, -(-self.n1 // 8) * 8
        tensors = 2 if self.front == GATE or self.sums else 1
        panels = -(-self.n2 // 64) + -(-rows // 64)
        gain = 2 * width if self.front == NORM else 0
        ranges = 3 * 4 * self.threads // 32
        held = 128 * rows * panels + self.stages * tensors * width * 2
        return held + gain + (0 if self.over else self._staged_bytes) + ranges

    @property
    def _staged_bytes(self) -> int:
        """What results take until they are written."""
        return self.n1 * (-(-self.n2 * (1 if self.bits else 2) // 16) * 16 + 16)

    @property
    def may_be_over(self) -> bool:
        """Whether results may lie where a token was: there is room, and nothing that stays zero."""
        whole = self.n1 % 8 == 0 and self.n2 % 64 == 0
        return whole and self._staged_bytes <= 128 * self.n1 * (self.n2 // 64)

    @property
    def registers(self) -> int:
        """Of a thread: the right factor, what is between products, sums; and some for all else."""
        return 4 * -(-self.n2 // 16) + -(-self.n1 // 16) * (4 + 8) + 24

    @property
    def fits(self) -> bool:
        """Whether so many blocks have room on a core."""
        threads = self.blocks * self.threads
        shared = self.blocks * (self.shared_bytes + RESERVED)
        registers = REGISTERS // threads // 8 * 8 + (SPILLED if self.blocks == 2 else 0)
        return shared <= SHARED_BYTES and threads <= THREADS and self.registers <= registers


NONE, NORM, GATE = 0, 1, 2
"""What stands in front of a transform."""


@functools.cache
def best_cut(cut: Cut) -> Cut | None:
    """Return how tokens are cut; None where a core has no room for one.

    The most warps that have room hide what each waits for; of as many those with more tokens on
    their way; of these those that need not wait before a token lies where results did.
    """
    held = (
        replace(cut, blocks=blocks, stages=stages, over=over)
        for blocks, stages in itertools.product(range(1, MOST_BLOCKS + 1), (1, 2))
        for over in (False, True)
        if cut.may_be_over or not over
    )
    fitting = [one for one in held if one.fits]
    return max(fitting, key=lambda one: (one.blocks, one.stages, not one.over), default=None)


class _Operands(ctypes.Structure):
    """As in the kernel's source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "x", "y", "gain", "left", "right", "clip_low", "clip_high", "sum", "out", "scales"
        )),
        ("tokens", ctypes.c_int), ("eps", ctypes.c_float),
        ("x_stride", ctypes.c_longlong), ("y_stride", ctypes.c_longlong),
    )  # fmt: skip


def launch_many(
    x: Tensor,
    left: Tensor,
    right: Tensor,
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
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """As `transforms.launch_transform`; None where the kernel is not for these.

    It takes bf16 alone, whose range needs no norm before the products; rows of `x` and `y` at
    multiples of 16 bytes; and a right factor of a multiple of 8 features.
    """
    if not runs_compiled(x.device):
        return None
    given = [t for t in (x, y, left, right, weight, clip_low, clip_high) if t is not None]
    kinds = {t.dtype for t in given}
    if kinds != {torch.bfloat16}:
        say_instead(FILES[-1], f"transforms in {', '.join(sorted(map(str, kinds)))}")
        return None
    factors = left, right
    left, right = left.contiguous(), right.contiguous()
    # A kernel that starts early reads factors before the one in front, which may copy one, ends.
    early = overlapping(x.device)["OVERLAP"] and left is factors[0] and right is factors[1]
    lead, width = x.shape[:-1], x.shape[-1]
    x_rows, y_rows = (None if t is None else t.reshape(-1, width) for t in (x, y))
    assert x_rows is not None
    if not _in_pieces(x_rows) or (y_rows is not None and not _in_pieces(y_rows)):
        say_instead(FILES[-1], "rows of tokens do not begin at multiples of 16 bytes")
        return None
    planned = _planned(
        left.shape[0], right.shape[0], before, y is not None, offset, bits, pairs,
        clip_low is not None or clip_high is not None, x.device,
    )  # fmt: skip
    if planned is None:
        return None
    cut, function, most_blocks = planned
    tokens = x_rows.shape[0]
    out, scales, total = results_of(cut, lead, x.device)
    operands = operands_of_many(
        x_rows, y_rows, weight, left, right, clip_low, clip_high, total, out, scales, tokens, eps,
    )  # fmt: skip
    launch(function, (min(tokens, most_blocks),), cut.threads, operands, x.device, early)
    return out, scales, total


@functools.cache
def _planned(
    n1: int,
    n2: int,
    before: str,
    two: bool,
    offset: float,
    bits: int,
    pairs: bool,
    clipped: bool,
    device: torch.device,
) -> tuple[Cut, Function, int] | None:
    """Return a cut, its kernel, and how many blocks a GPU holds; None, which is said, if none is.

    Found once for each form: a launch should take less than the kernel.

    Args:
        two: Whether there is a `y`.
    """
    front = NORM if before == "norm" else GATE if before else NONE
    cut = None
    if n2 % 8 == 0 and n1 <= LARGEST and offset in (0.0, 1.0):
        cut = best_cut(
            Cut(
                n1, n2, front, front == NORM and two, int(offset),
                before if front == GATE else "", bits, pairs, bits > 0 and clipped,
            )
        )  # fmt: skip
    if cut is None:
        say_instead(FILES[-1], f"it does not take factors of {n1} and {n2}, or gains + {offset}")
        return None
    constants = constants_of(cut.constants)
    function = kernel(
        FILES, "hopper_transform", constants, cut.shared_bytes, device, product_of(n1)
    )
    return None if function is None else (cut, function, cores_of(device) * cut.blocks)


def product_of(n1: int) -> str:
    """Return the text of the product of the kernel, whose right sides have N1 rows."""
    rows = -(-n1 // 8) * 8
    return product("wgmma_product", rows, "bf16", from_registers=True, by_rows=False, begins=True)


@functools.cache
def cores_of(device: torch.device) -> int:
    """Return how many cores a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _in_pieces(rows: Tensor) -> bool:
    """Return whether rows begin, and lie, as pieces of 16 bytes."""
    return rows.stride(-1) == 1 and rows.data_ptr() % 16 == 0 and rows.stride(0) % 8 == 0


def results_of(
    cut: Cut, lead: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return room for codes or values, scales and sums of tokens [*lead, N1 N2]."""
    width = cut.n1 * cut.n2
    kind = torch.bfloat16 if cut.bits == 0 else torch.uint8 if cut.pairs else torch.int8
    out = torch.empty((*lead, width // 2 if cut.pairs else width), dtype=kind, device=device)
    scales = torch.empty(lead, dtype=torch.float32, device=device) if cut.bits else None
    total = torch.empty((*lead, width), dtype=torch.bfloat16, device=device) if cut.sums else None
    return out, scales, total


def operands_of_many(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip_low: Tensor | None,
    clip_high: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    tokens: int,
    eps: float,
) -> ctypes.Structure:
    """Return what the kernel takes: x and `y` of tokens [T, N1 N2], results contiguous."""
    given = (x, y, weight, left, right, clip_low, clip_high, total, out, scales)
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in given)
    return _Operands(*addresses, tokens, eps, x.stride(0), 0 if y is None else y.stride(0))
