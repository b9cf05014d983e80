"""Rounding one matrix: by itself, or so that its products with what it is given change least."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.ir.encoding import Packed, stored_scales
from graphopt.ir.weights import Array, Dequantised, Weight
from graphopt.solvers.gptq import gptq, refine
from graphopt.solvers.grids import Grid, best_grid, full_range


def choose_grid(
    matrix: Tensor,
    encoding: Packed,
    dtype: torch.dtype,
    clip: bool,
    importance: Tensor | None = None,
) -> Grid:
    """Return the grid of a matrix [rows, length], its scales as `dtype` stores them.

    Args:
        clip: Whether the range is searched; else codes reach all of it.
        importance: See `best_grid`.
    """
    bits, group, symmetric = encoding.bits, encoding.group, encoding.symmetric
    if clip:
        return _stored(best_grid(matrix, bits, group, symmetric, importance), dtype)
    return _stored(full_range(matrix, bits, group, symmetric), dtype)


def _stored(grid: Grid, dtype: torch.dtype) -> Grid:
    """Return a grid with its scales as they are stored, in the dtype they have here."""
    return replace(grid, scales=stored_scales(grid.scales, dtype).to(grid.scales.dtype))


def round_to_grid(
    matrix: Tensor, grid: Grid, dtype: torch.dtype, moments: Tensor | None
) -> tuple[Grid, Tensor]:
    """Return codes for a matrix, and the grid that they are codes of.

    Args:
        dtype: In which scales are stored.
        moments: Second moments of what the matrix is multiplied by, damped; None to take the
            nearest codes.
    """
    if moments is None:
        return grid, grid.codes(matrix)
    grid, codes = refine(matrix, moments, grid, gptq(matrix, moments, grid))
    return _stored(grid, dtype), codes


@dataclass(frozen=True)
class RoundedMatrix:
    """A matrix as codes.

    Attributes:
        tensors: Those of its encoding, by suffix.
        values: What the codes stand for, as they will be read, fp32 [rows, length].
    """

    tensors: dict[str, Tensor]
    values: Tensor


def packed(encoding: Packed, grid: Grid, codes: Tensor, dtype: torch.dtype) -> RoundedMatrix:
    """Return codes of a grid as the tensors of an encoding, on the CPU."""
    tensors = encoding.pack(codes, grid.scales.to(dtype), grid.zeros)
    stored = {suffix: tensor.cpu().contiguous() for suffix, tensor in tensors.items()}
    return RoundedMatrix(stored, encoding.dequantise(tensors).float())


def packed_weight(weight: Weight, encoding: Packed, rounded: RoundedMatrix) -> Weight:
    """Return a weight whose value is that of codes."""
    parts = {suffix: Array(tensor) for suffix, tensor in rounded.tensors.items()}
    return weight.with_producer(Dequantised(encoding, **parts))
