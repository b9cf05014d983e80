"""Weights of four-bit codes in the layout that the kernels read: packing, and what they stand for.

Layout letters: K features in, N features out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ir import functional

SPANS = (128, 64, 32)
"""Neighbouring inputs whose codes lie together; both halves are operands of a matrix unit."""
GROUPS = (32, 64)
"""Sizes of groups that divide a span of 128; others are of one span or several."""
FEWEST_ROWS = 16
"""Rows of the smallest tile: a weight has a counter for as many of its outputs."""


@dataclass(frozen=True)
class PackedCodes:
    """A weight [N, K] of four-bit codes, as the kernels read it.

    Attributes:
        codes: uint8 [K / span, N, span / 2]; see kernels/packed_linear.py.
        scales: [K / group, N], of 16 bits.
        zeros: As the scales, what the signed number of a code is too large by; None for 0.
        span: Inputs whose codes lie together.
        arrived: int32 of zeros, by which programs that add parts of a tile count each other.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    span: int
    arrived: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        spans, outputs, _ = self.codes.shape
        return outputs, spans * self.span

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // len(self.scales)


def span_of(inputs: int, group: int) -> int | None:
    """Return how many of the inputs' codes lie together where `group` of them share a scale.

    None where the kernels read no such groups.
    """
    fitting = (
        span
        for span in SPANS
        if inputs % span == 0 and (group % span == 0 or (span == SPANS[0] and group in GROUPS))
    )
    return next(fitting, None)


def pack_codes(
    packed: Tensor, scales: Tensor, zeros: Tensor | None = None, *, group: int
) -> PackedCodes | None:
    """Return a weight in the layout of the kernels; None where its groups do not fit them.

    Args:
        packed: uint8 [N, groups, ceil(group / 2)], codes of four bits as `functional.dequantise`
            reads them, groups along the inputs.
        scales: [N, groups].
        zeros: uint8 [N, ceil(groups / 2)].
        group: Codes of a group.
    """
    outputs, groups, _ = packed.shape
    span = span_of(groups * group, group)
    if span is None:
        return None
    # A code less 8 is the signed number with the same bits but for the highest.
    signed = functional.unpack(packed, 4).reshape(outputs, -1, 2, span // 2) ^ 8
    halves = _for_lanes(signed[:, :, 0] | signed[:, :, 1] << 4)
    less = None
    if zeros is not None:
        unpacked = functional.unpack(zeros, 4)[:, :groups].to(scales.dtype)
        less = (unpacked - 8).t().contiguous()
    counters = -(-outputs // FEWEST_ROWS)
    return PackedCodes(
        halves.transpose(0, 1).contiguous(),
        scales.t().contiguous(),
        less,
        span,
        torch.zeros(counters, dtype=torch.int32, device=packed.device),
    )


def _for_lanes(codes: Tensor) -> Tensor:
    """Return codes of halves [..., H] with those of each of four lanes together.

    A lane of a warp has four neighbours of each 16 (`place_of` of kernels/packed_linear.py).
    """
    return codes.unflatten(-1, (-1, 4, 4)).transpose(-3, -2).flatten(-3)


def _from_lanes(codes: Tensor) -> Tensor:
    """Return codes of halves [..., H] in the order of their inputs."""
    return codes.unflatten(-1, (4, -1, 4)).transpose(-3, -2).flatten(-3)


def values_of(codes: Tensor, scales: Tensor, zeros: Tensor | None, *, group: int) -> Tensor:
    """Return what rows of a weight stand for, [N, K], from tensors as those of `PackedCodes`.

    Args:
        group: Inputs that share a scale.
    """
    codes = _from_lanes(codes)
    signed = (torch.cat((codes & 15, codes >> 4), -1) ^ 8).float() - 8
    grouped = signed.transpose(0, 1).reshape(codes.shape[1], len(scales), group)
    if zeros is not None:
        grouped = grouped - zeros.t()[..., None].float()
    return (grouped * scales.t()[..., None].float()).flatten(1).to(scales.dtype)
