"""The linear map that leaves least error where activations and weights are both rounded.

With rows x of second moments C and a matrix W of Gram matrix G = W^T W, x is multiplied by P and W
by P^-T. A quantiser whose step follows the length of what it rounds makes an error of the size of
tr(P^T C P) in x P, which the weights multiply by tr(P^-1 G P^-T); rounding the weights costs the
same product. With M = P P^T it is tr(C M) tr(G M^-1), whose minimum is M = C^-1 # G, the geometric
mean; P is M^1/2 times any rotation, such as one that spreads outliers.

Source: Federici et al., CAT, arXiv 2603.04359 (alignment); WUSH, arXiv 2512.00956 (a Hadamard
matrix times the root of second moments). That the best Kronecker product is found by turns follows
from the product's being convex along geodesics in each of its factors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RIDGE = 1e-3
"""What is added to the diagonal of a second moment, as a share of its mean: it bounds the condition
of what is solved for by directions that the text hardly has."""

ROUNDS = 6
"""How often the factors are solved for in turns; the product changes by less than 1e-3 then."""


def _by_eigenvalues(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[-1].clamp(min=1e-300) * 1e-14
    return (vectors * function(values.clamp(min=floor))) @ vectors.T


def square_root(matrix: Tensor) -> Tensor:
    """Return the positive root of a positive definite matrix."""
    return _by_eigenvalues(matrix, torch.sqrt)


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """Return a # b, the positive definite X with X a^-1 X = b.

    Source: Bhatia, Positive Definite Matrices, 2007, chapter 4.
    """
    root = square_root(a)
    inverse = _by_eigenvalues(a, lambda values: values.rsqrt())
    return root @ square_root(inverse @ b @ inverse) @ root


def aligned(moments: Tensor, gram: Tensor) -> Tensor:
    """Return C^-1 # G, scaled to determinant 1, for C and G with `RIDGE` on their diagonals."""
    inverse = _by_eigenvalues(_ridged(moments), lambda values: 1 / values)
    return _unimodular(geometric_mean(inverse, _ridged(gram)))


def aligned_factors(moments: Tensor, gram: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the M1 kron M2 of least tr(C M) tr(G M^-1), each of determinant 1.

    Args:
        moments, gram: C and G, [rows * columns, rows * columns].
        rows: The size of M1.

    Returns:
        The two on the CPU.
    """
    columns, device = moments.shape[0] // rows, moments.device
    shape = (rows, columns, rows, columns)
    c, g = _ridged(moments).reshape(shape), _ridged(gram).reshape(shape)

    def solved(form: str, other: Tensor) -> Tensor:
        """Return one factor for the other; small matrices are quicker to solve for on a CPU."""
        parts = (c, other), (g, torch.linalg.inv(other))
        return aligned(*(torch.einsum(form, m, turned.to(device)).cpu() for m, turned in parts))

    first = torch.eye(rows, dtype=moments.dtype)
    second = torch.eye(columns, dtype=moments.dtype)
    for _ in range(ROUNDS if min(rows, columns) > 1 else 1):
        first = solved("aibj,ij->ab", second)
        second = solved("aibj,ab->ij", first)
    return first, second


def aligned_scale(moments: Tensor, gram: Tensor) -> Tensor:
    """Return the positive diagonal c of least tr(C c^2) tr(G c^-2), of geometric mean 1."""
    scale = (_ridged(gram).diagonal() / _ridged(moments).diagonal()).pow(0.25)
    return scale / scale.log().mean().exp()


def _ridged(matrix: Tensor) -> Tensor:
    mean = matrix.diagonal().mean().clamp(min=1e-30)
    ridged = matrix.clone()
    ridged.diagonal().add_(RIDGE * mean)
    return ridged


def _unimodular(matrix: Tensor) -> Tensor:
    return matrix / torch.linalg.eigvalsh(matrix).clamp(min=1e-300).log().mean().exp()
