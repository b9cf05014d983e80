"""Rounding a matrix to a grid so that its products with given inputs change least.

With inputs x and their second moments H = sum x x^T, a matrix W that becomes V moves its products
by sum |(V - W) x|^2 = trace((V - W) H (V - W)^T). Rows do not interact, and elements of a row do by
H alone. `gptq` rounds column after column, each time moving the columns to come so that they make
up for the error made (Frantar et al., GPTQ, arXiv 2210.17323, section 3.3; which column comes when
is by the size of its moment, "act-order"). `refine` then takes single codes, and scales for all
codes at once, to where the sum is least with all else as it is (coordinate descent: Behdin et al.,
QuantEase, arXiv 2309.01885, section 3), which no step makes worse.

Moments are in fp64 where they are inverted, and products in the dtype of the matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from graphopt.solvers.grids import Grid
from graphopt.support.recorded import Recorded

DAMPING = 0.01
"""What is added to every moment of a feature with itself, times their mean."""

COLUMNS = 128
"""Columns between two updates of all those behind them."""

SWEEPS = 2
"""How often `refine` goes over all codes."""

AT_ONCE = 2**24
"""Elements of the largest tensor that scales are solved for with."""


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Return second moments [length, length] in fp64, made well-conditioned.

    A feature that is always 0 gets the moments of one that has nothing to do with the others.

    Raises:
        ValueError: A moment is NaN or infinite.
    """
    moments = gram.double()
    diagonal = moments.diagonal()
    if not bool(moments.isfinite().all()):
        raise ValueError("the activations hold NaN or infinity")
    mean = float(diagonal.mean())
    return moments + torch.eye(len(gram), dtype=moments.dtype, device=gram.device) * (
        damping * mean if mean > 0 else 1.0
    )


def gptq(matrix: Tensor, moments: Tensor, grid: Grid) -> Tensor:
    """Return codes [rows, length] of a matrix, chosen column by column.

    Args:
        matrix: fp32 or wider, [rows, length].
        moments: Second moments of what it is multiplied by, as `damped` returns them.
        grid: What its elements may become.
    """
    order = moments.diagonal().argsort(descending=True, stable=True)
    permuted = moments[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(permuted))
    upper = torch.linalg.cholesky(inverse, upper=True).to(matrix.dtype)
    # Columns are rows here, which lie in one piece of memory.
    left = matrix.t()[order].contiguous()
    scales, zeros = grid.by_column(order)
    codes = torch.empty_like(left)
    for start in range(0, len(order), COLUMNS):
        part = slice(start, min(start + COLUMNS, len(order)))
        codes[part], errors = _run(
            _round_columns,
            left[part],
            upper[part, part],
            scales[part],
            zeros[part],
            last=grid.last,
        )
        left[part.stop :].addmm_(upper[part, part.stop :].t(), errors, alpha=-1)
    found = torch.empty_like(codes)
    found[order] = codes
    return found.t().contiguous()


def _round_columns(
    left: Tensor, upper: Tensor, scales: Tensor, zeros: Tensor, last: int
) -> tuple[Tensor, Tensor]:
    """Return the codes and errors of some columns, each moved by the errors in front of it.

    Args:
        left: The columns as rows, [columns, rows]; it is written to.
        upper: Their part of the Cholesky factor of the inverse moments, [columns, columns].
        scales, zeros: Of each element, [columns, rows].
        last: The largest code.
    """
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    for index in range(len(left)):
        code = ((left[index] / scales[index]).round() + zeros[index]).clamp(0, last)
        codes[index] = code
        off = left[index] - (code - zeros[index]) * scales[index]
        errors[index] = off / upper[index, index]
        left[index + 1 :].addr_(upper[index, index + 1 :], errors[index], alpha=-1)
    return codes, errors


def refine(
    matrix: Tensor, moments: Tensor, grid: Grid, codes: Tensor, sweeps: int = SWEEPS
) -> tuple[Grid, Tensor]:
    """Return a grid and codes that leave no more error than those given.

    Scales are solved for before each sweep over the codes; zero points stay.

    Args:
        matrix, moments, grid: As for `gptq`.
        codes: [rows, length].
    """
    narrow = moments.to(matrix.dtype)
    for _ in range(sweeps):
        grid = best_scales(matrix, moments, grid, codes)
        codes = _sweep(matrix, narrow, grid, codes)
    return best_scales(matrix, moments, grid, codes), codes


def _sweep(matrix: Tensor, moments: Tensor, grid: Grid, codes: Tensor) -> Tensor:
    """Return codes each of which is, in turn, the best with all others as they are."""
    # Columns are rows here, which lie in one piece of memory.
    values = grid.values(codes).t().contiguous()
    gradient = moments @ (values - matrix.t())
    codes = codes.t().contiguous()
    scales, zeros = grid.by_column(torch.arange(len(values), device=values.device))
    for start in range(0, len(values), COLUMNS):
        part = slice(start, min(start + COLUMNS, len(values)))
        made, moved = _run(
            _descend_columns, values[part], gradient[part].clone(), moments[part, part],
            scales[part], zeros[part], last=grid.last,
        )  # fmt: skip
        codes[part] = made
        gradient.addmm_(moments[:, part], moved)
    return codes.t().contiguous()


def _descend_columns(
    values: Tensor, inside: Tensor, moments: Tensor, scales: Tensor, zeros: Tensor, last: int
) -> tuple[Tensor, Tensor]:
    """Return the codes of some columns, each the best as those in front of it are by then.

    Args:
        values: What the columns are, as rows: [columns, rows].
        inside: The gradient of half the error by them; it is written to.
        moments: Of these columns, [columns, columns].
        scales, zeros: Of each element, [columns, rows].
        last: The largest code.

    Returns:
        The codes, and by how much the values moved.
    """
    codes, moved = torch.empty_like(values), torch.empty_like(values)
    for index in range(len(values)):
        goal = values[index] - inside[index] / moments[index, index]
        code = ((goal / scales[index]).round() + zeros[index]).clamp(0, last)
        codes[index] = code
        moved[index] = (code - zeros[index]) * scales[index] - values[index]
        inside.addr_(moments[index], moved[index])
    return codes, moved


_RECORDED: dict[Hashable, Callable[[Sequence[Tensor]], tuple[Tensor, ...]]] = {}
"""What was recorded, by function, code, device and shapes."""


def _run(
    work: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor, last: int
) -> tuple[Tensor, Tensor]:
    """Call a function of tensors and a largest code; on a GPU it is recorded for their shapes."""
    if tensors[0].device.type != "cuda":
        return work(*tensors, last=last)
    shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    key = (work, last, tensors[0].device, shapes)
    if key not in _RECORDED:
        plain = functools.partial(work, last=last)
        try:
            _RECORDED[key] = Recorded(plain, tensors)
        except RuntimeError:
            # Another thread used the device meanwhile, say: kernel by kernel it is only slower.
            _RECORDED[key] = lambda given: plain(*given)
    first, second = _RECORDED[key](tensors)
    return first, second


def best_scales(matrix: Tensor, moments: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """Return the grid with the scales that are best for given codes, where there are any.

    A row's scales are solved for together: with its codes c_g of group g, moved by their zero
    point and 0 elsewhere, they are the s of least |sum_g s_g c_g - w| in the metric of the moments.
    """
    rows, groups = grid.scales.shape
    narrow = moments.to(matrix.dtype)
    moved = codes.to(matrix.dtype).unflatten(-1, (groups, grid.group)) - grid.zeros[..., None]
    wanted = matrix @ narrow
    solved: list[Tensor] = []
    for first in range(0, rows, step := max(1, AT_ONCE // (groups * len(moments)))):
        part = moved[first : first + step]
        # [rows, groups, length]: each group's codes times the moments.
        products = torch.einsum("rgi,gij->rgj", part, narrow.unflatten(0, (groups, grid.group)))
        system = torch.einsum("rgj,rhgj->rhg", *_by_group(part, products)).double()
        right = (part * wanted[first : first + step].unflatten(-1, (groups, grid.group))).sum(-1)
        diagonal = system.diagonal(dim1=-2, dim2=-1)
        empty = diagonal <= 0
        diagonal.add_(torch.where(empty, 1.0, 1e-9 * diagonal))
        found = torch.linalg.solve(system, right.double())
        old = grid.scales[first : first + step].double()
        usable = ~empty & found.isfinite() & (found != 0)
        solved.append(torch.where(usable, found, old).to(grid.scales.dtype))
    return replace(grid, scales=torch.cat(solved))


def _by_group(part: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [rows, groups, group] and products as [rows, groups, groups, group]."""
    rows, groups, group = part.shape
    return part, products.view(rows, groups, groups, group)


def output_error(difference: Tensor, moments: Tensor) -> float:
    """Return sum |difference x|^2 over inputs of the given second moments."""
    wide = difference.double()
    return float(((wide @ moments) * wide).sum())
