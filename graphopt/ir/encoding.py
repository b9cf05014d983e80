"""How the elements of a matrix are stored: as they are, or as packed integers with scales.

A dense weight is one tensor. A packed one is up to three, which lie in files under the weight's
name and a suffix. For a weight [out, in] with groups along axis 1:

    NAME.packed   uint8 [out, groups, ceil(group * bits / 8)]   the codes, the first in the low bits
    NAME.scales   float [out, groups]
    NAME.zeros    uint8 [out, ceil(groups * bits / 8)]          the groups' zero points, packed
                                                                alike; not there where it is
                                                                symmetric

and element (o, i), in group g = i // group, is (code[o, i] - zero[o, g]) * scale[o, g]. Symmetric
codes have the zero point 2 ** (bits - 1). A scale may be negative. Bits of codes follow each other
from the lowest of the first byte on, so that a code of 3 bits may lie in two bytes; each group
begins with a byte, and what is left over of its last one is 0. One group may be a whole row: then
there is a scale for each output channel. With groups along axis 0 the tensors are those of the
transposed weight. Where groups fill bytes this is the layout of com.microsoft::MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ir import functional

BITS = (2, 3, 4, 8)
"""Widths of a code."""

LEAST_GROUP = 16
"""The smallest group that one which does not divide a row is halved to: ONNX Runtime's smallest."""


@dataclass(frozen=True, slots=True)
class Packed:
    """The encoding of a matrix as integer codes that share a scale in groups.

    Attributes:
        bits: Width of a code, one of `BITS`.
        group: How many neighbouring elements share a scale and a zero point.
        axis: The axis [out, in] along which elements are neighbours.
        symmetric: Whether the zero point is 2 ** (bits - 1) everywhere, and not stored.

    Raises:
        ValueError: The bits or the axis are others, or a group has no element.
    """

    bits: int
    group: int
    axis: int = 1
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"codes of {self.bits} bits: they may have {BITS}")
        if self.axis not in (0, 1):
            raise ValueError(f"groups along axis {self.axis}: a matrix has the axes 0 and 1")
        if self.group < 1:
            raise ValueError(f"groups of {self.group} codes: a group has one at least")

    def __str__(self) -> str:
        about = f"bits={self.bits}, group={self.group}, axis={self.axis}"
        return f"packed({about}{', symmetric' if self.symmetric else ''})"

    @property
    def group_bytes(self) -> int:
        """How many bytes the codes of a group take."""
        return -(-self.group * self.bits // 8)

    @property
    def fills_bytes(self) -> bool:
        """Whether the codes of a group leave no bit of their bytes over."""
        return self.group * self.bits % 8 == 0

    def stored(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of each tensor of a weight, by its suffix.

        Args:
            shape: The weight's, [out, in].
            dtype: The dtype of the scales, and of what `functional.dequantise` returns.

        Raises:
            ValueError: The weight is no matrix, or its groups do not come out even.
        """
        if len(shape) != 2:
            raise ValueError(f"a weight {list(shape)} is no matrix, and only those are packed")
        rows, length = shape if self.axis == 1 else shape[::-1]
        if length % self.group:
            raise ValueError(f"axis {self.axis} of {list(shape)} is no multiple of {self.group}")
        groups = length // self.group
        tensors = {
            "packed": ((rows, groups, self.group_bytes), torch.uint8),
            "scales": ((rows, groups), dtype),
        }
        if not self.symmetric:
            tensors["zeros"] = ((rows, -(-groups * self.bits // 8)), torch.uint8)
        return tensors

    def shape_of(self, packed: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape [out, in] of the weight whose codes have the shape `packed`."""
        rows, groups, _ = packed
        whole = (rows, groups * self.group)
        return whole if self.axis == 1 else (whole[1], whole[0])

    def dequantise(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the weight [out, in] in the dtype of its scales; `tensors` are by suffix."""
        return functional.dequantise(
            tensors["packed"], tensors["scales"], tensors.get("zeros"),
            bits=self.bits, group=self.group, axis=self.axis,
        )  # fmt: skip

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> dict[str, Tensor]:
        """Return codes and what they share as the tensors of a weight, by suffix.

        Args:
            codes: Whole numbers from 0 to 2 ** bits - 1, [rows, length]: length runs along `axis`.
            scales: [rows, groups].
            zeros: Zero points [rows, groups], for an encoding that is not symmetric.
        """
        grouped = codes.to(torch.uint8).unflatten(-1, (-1, self.group))
        tensors = {"packed": pack(grouped, self.bits), "scales": scales}
        if not self.symmetric:
            assert zeros is not None
            tensors["zeros"] = pack(zeros.to(torch.uint8), self.bits)
        return tensors

    def codes(self, packed: Tensor) -> Tensor:
        """Return the codes [rows, groups, group], uint8, of a tensor `packed` of a weight."""
        return functional.unpack(packed, self.bits)[..., : self.group]

    def zero_points(self, zeros: Tensor, groups: int) -> Tensor:
        """Return the zero points [rows, groups], uint8, of a tensor `zeros` of a weight."""
        return functional.unpack(zeros, self.bits)[:, :groups]

    def quantise(self, weight: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return a matrix rounded to the nearest codes, as tensors by suffix.

        The scale of a group makes its largest magnitude, or from its least to its largest element
        and 0, fit the codes. Other ways to choose codes, such as GPTQ, fill the same tensors.

        Args:
            weight: [out, in].
            dtype: The dtype of the scales; by default the weight's.

        Raises:
            ValueError: See `stored`.
        """
        kept = weight.dtype if dtype is None else dtype
        self.stored(tuple(weight.shape), kept)
        rows = weight.double().movedim(self.axis, -1).unflatten(-1, (-1, self.group))
        top = 2**self.bits - 1
        if self.symmetric:
            middle = 2 ** (self.bits - 1)
            scales = rows.abs().amax(-1) / (middle - 1)
            zeros = torch.full_like(scales, middle)
        else:
            low, high = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
            scales = (high - low) / top
            zeros = (-low / scales.masked_fill(scales == 0, 1.0)).round().clamp(0, top)
        # Codes are chosen for the scale as it is stored.
        scales = scales.masked_fill(scales == 0, 1.0).to(kept)
        codes = (rows / scales[..., None].double()).round() + zeros[..., None]
        return self.pack(codes.clamp(0, top).flatten(-2), scales, zeros)


def stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales as a dtype holds them, and fp16 too where that has such numbers.

    Files for other runtimes have scales in fp16, so that codes go there as they are. One that would
    become 0 or infinite is the smallest or largest number of the dtype.
    """
    limits, half = torch.finfo(dtype), torch.finfo(torch.float16)
    # Of fp16, the normal numbers end where scales of small weights still lie.
    smallest = limits.tiny * limits.eps if dtype == torch.float16 else limits.tiny
    size = scales.abs().clamp(smallest, limits.max)
    in_range = (size >= half.tiny) & (size <= half.max / 2)  # rounding again leads nowhere else
    size = torch.where(in_range, size.to(torch.float16).to(size.dtype), size)
    return size.copysign(scales).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Put codes [..., n] of `bits` bits into bytes [..., ceil(n * bits / 8)], the first lowest.

    `functional.unpack` takes them apart again; bits that are left over are 0.
    """
    wide = codes.to(torch.uint8)[..., None]
    stream = (wide >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    stream = stream.flatten(-2)
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(
        -1, dtype=torch.uint8
    )


def group_of(group: int, length: int) -> int:
    """Return the size of groups of a row: as asked for, or the next smaller half that divides it.

    Args:
        group: Elements; 0 for a whole row.
        length: Of a row.

    Returns:
        A divisor of the length; the length itself where no half of at least `LEAST_GROUP` is one.
    """
    if group == 0:
        return length
    while length % group and group % 2 == 0 and group // 2 >= LEAST_GROUP:
        group //= 2
    return length if length % group else group
