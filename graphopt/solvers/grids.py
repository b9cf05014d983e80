"""Grids of evenly spaced values for the elements of a matrix, and the ones that fit it best.

A matrix [rows, length] has groups of `group` neighbours along its rows, the last axis. A group has
a scale and a zero point, and its elements become (code - zero) * scale with codes from 0 to
2^bits - 1. A symmetric grid has the zero point 2^(bits - 1) throughout. A scale may be negative:
codes of a symmetric grid reach one step further on one side, which may be either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CLIPS = tuple(1 - 0.05 * step for step in range(13))
"""Shares of a group's range that are tried, from all of it to two fifths."""

ALTERNATIONS = 4
"""How often codes for scales, and scales for codes, are solved for behind the best share."""

AT_ONCE = 2**24
"""Elements of a matrix that are worked on together."""


@dataclass(frozen=True)
class Grid:
    """The values that elements of a matrix [rows, length] may have.

    Attributes:
        scales, zeros: [rows, groups], the zeros whole numbers from 0 to 2^bits - 1.
        bits: Width of a code.
        group: Elements of a group.
        symmetric: Whether every zero point is 2^(bits - 1).
    """

    scales: Tensor
    zeros: Tensor
    bits: int
    group: int
    symmetric: bool

    def codes(self, matrix: Tensor) -> Tensor:
        """Return the nearest codes of a matrix [rows, length], of its dtype; halves to even."""
        groups = matrix.unflatten(-1, (-1, self.group))
        return self._nearest(groups, self.scales[..., None], self.zeros[..., None]).flatten(-2)

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes [rows, length] stand for, in the dtype of the scales."""
        groups = codes.to(self.scales.dtype).unflatten(-1, (-1, self.group))
        return ((groups - self.zeros[..., None]) * self.scales[..., None]).flatten(-2)

    @property
    def last(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def rows(self, part: slice) -> Grid:
        """Return the grid of some rows."""
        return replace(self, scales=self.scales[part], zeros=self.zeros[part])

    def by_column(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales and zeros of columns, as rows: [columns, rows].

        Args:
            order: The places of the columns, int64.
        """
        at = order // self.group
        return self.scales.t()[at].contiguous(), self.zeros.t()[at].contiguous()

    def _nearest(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return ((values / scales).round() + zeros).clamp(0, self.last)


def full_range(matrix: Tensor, bits: int, group: int, symmetric: bool, share: float = 1.0) -> Grid:
    """Return the grid whose codes reach a share of the range of each group.

    A symmetric one reaches the largest magnitude by 2^(bits - 1) - 1 steps, by one step alone for 2
    bits; another goes from a group's least to its largest element and holds 0. A group of zeros has
    the scale 1.
    """
    groups = matrix.unflatten(-1, (-1, group))
    middle, last = 2 ** (bits - 1), 2**bits - 1
    if symmetric:
        scales = share * groups.abs().amax(-1) / (middle - 1)
        zeros = torch.full_like(scales, middle)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = share * (high - low) / last
        zeros = (-share * low / scales.masked_fill(scales == 0, 1.0)).round().clamp(0, last)
    return Grid(scales.masked_fill(scales == 0, 1.0), zeros, bits, group, symmetric)


def best_grid(
    matrix: Tensor, bits: int, group: int, symmetric: bool, importance: Tensor | None = None
) -> Grid:
    """Return the grid with the least squared error, found by trying shares of the range.

    Behind the best of `CLIPS`, of either sign where the grid is symmetric, the scales that are best
    for the codes and the codes that are nearest for the scales are taken in turns: no turn makes it
    worse.

    Args:
        matrix: fp32 or wider, [rows, length].
        importance: [length]: what an element's squared error is times, none of it negative.
    """
    length = matrix.shape[-1]
    weighting = torch.ones(length, dtype=matrix.dtype, device=matrix.device)
    if importance is not None and bool(importance.sum() > 0):
        weighting = importance.to(weighting) / importance.mean().to(weighting)
    grids = [
        _best_of(rows, bits, group, symmetric, weighting)
        for rows in matrix.split(max(1, AT_ONCE // length))
    ]
    scales, zeros = (
        torch.cat([getattr(grid, key) for grid in grids]) for key in ("scales", "zeros")
    )
    return Grid(scales, zeros, bits, group, symmetric)


def _best_of(matrix: Tensor, bits: int, group: int, symmetric: bool, weighting: Tensor) -> Grid:
    best: Grid | None = None
    least = torch.empty(0)
    for grid in _candidates(matrix, bits, group, symmetric):
        error = _errors(grid, matrix, weighting)
        if best is None:
            best, least = grid, error
            continue
        better = error < least
        best = replace(
            best,
            scales=torch.where(better, grid.scales, best.scales),
            zeros=torch.where(better, grid.zeros, best.zeros),
        )
        least = torch.where(better, error, least)
    assert best is not None
    for _ in range(ALTERNATIONS):
        codes = (best.codes(matrix).unflatten(-1, (-1, group))) - best.zeros[..., None]
        weighted = codes * weighting.unflatten(-1, (-1, group))
        power = (weighted * codes).sum(-1)
        scales = (weighted * matrix.unflatten(-1, (-1, group))).sum(-1) / power
        usable = (power > 0) & scales.isfinite() & (scales != 0)
        best = replace(best, scales=torch.where(usable, scales, best.scales))
    return best


def _candidates(matrix: Tensor, bits: int, group: int, symmetric: bool) -> Iterator[Grid]:
    for share in CLIPS:
        grid = full_range(matrix, bits, group, symmetric, share)
        yield grid
        if symmetric:
            yield replace(grid, scales=-grid.scales)


def _errors(grid: Grid, matrix: Tensor, weighting: Tensor) -> Tensor:
    """Return the squared error of each group, [rows, groups]."""
    left = grid.values(grid.codes(matrix)) - matrix
    return (left.square() * weighting).unflatten(-1, (-1, grid.group)).sum(-1)
