"""Orthogonal matrices that spread, factor pairs, and the transform of least rounding error."""

from __future__ import annotations

import pytest
import torch

from graphopt.solvers.alignment import (
    RIDGE,
    aligned,
    aligned_factors,
    aligned_scale,
    geometric_mean,
)
from graphopt.solvers.orthogonal import factor_pair, hadamard, random_orthogonal, spreading

SIZES = {
    4096: (64, 64), 5120: (64, 80), 8192: (64, 128), 3584: (56, 64), 11008: (86, 128),
    14336: (112, 128), 28672: (128, 224), 688: (16, 43), 576: (24, 24), 1536: (32, 48),
    6: (2, 3), 46: (2, 23), 31: (1, 31), 1: (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_factors_have_the_least_sum(size):
    """Sizes of the paper, one where Fermat factoring is not minimal, odd ones, a prime."""
    assert factor_pair(size) == SIZES[size]


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 36, 48, 64, 108])
def test_hadamard_matrices_of_paleys_and_sylvesters_orders(size):
    matrix = hadamard(size)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("size", [3, 9, 14, 43, 86, 56])
def test_what_spreads_is_orthogonal_at_every_size(size):
    matrix = spreading(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert float(matrix.abs().max()) <= (2 / size) ** 0.5 * 2**0.5


def covariance(size, seed):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.randn(size, generator=generator, dtype=torch.float64).exp()
    q = random_orthogonal(size, generator)
    return q * spectrum @ q.T


def cost(c, g, m):
    return float((c @ m).trace() * (g @ torch.linalg.inv(m)).trace())


def ridged(matrix):
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    return matrix + RIDGE * float(matrix.diagonal().mean()) * eye


def test_the_geometric_mean_solves_its_equation_and_no_other_map_costs_less():
    c, g = covariance(6, 0), covariance(6, 1)
    mean = geometric_mean(c, g)
    assert torch.allclose(mean @ torch.linalg.inv(c) @ mean, g, rtol=1e-9, atol=1e-10)
    m = aligned(c, g)
    assert float(torch.linalg.det(m)) == pytest.approx(1.0)
    c, g = ridged(c), ridged(g)
    # The known value of the least cost: the square of the trace of (C^1/2 G C^1/2)^1/2.
    values, vectors = torch.linalg.eigh(c)
    root = vectors * values.sqrt() @ vectors.T
    least = float(torch.linalg.eigvalsh(root @ g @ root).sqrt().sum()) ** 2
    assert cost(c, g, m) == pytest.approx(least, rel=1e-9)
    for seed in range(2, 12):
        assert cost(c, g, covariance(6, seed)) > least


def test_factors_are_exact_for_products_and_a_minimum_otherwise():
    left, right = [(covariance(3, s), covariance(4, s + 10)) for s in (0, 1)]
    c, g = torch.kron(*left), torch.kron(*right)
    whole, parts = aligned(c, g), aligned_factors(c, g, 3)
    # What is added to the diagonals is no Kronecker product: 1e-3 of it shows.
    assert cost(ridged(c), ridged(g), torch.kron(*parts)) == pytest.approx(
        cost(ridged(c), ridged(g), whole), rel=1e-3
    )
    c, g = covariance(12, 5), covariance(12, 6)
    first, second = aligned_factors(c, g, 3)
    least = cost(ridged(c), ridged(g), torch.kron(first, second))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = [0.05 * torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (3, 4)]
        moved = [torch.linalg.matrix_exp(s + s.T) for s in step]
        roots = [torch.linalg.cholesky(m) for m in (first, second)]
        near = [r @ m @ r.T for r, m in zip(roots, moved, strict=True)]
        # Turns end when they gain less than a thousandth.
        assert cost(ridged(c), ridged(g), torch.kron(*near)) > least * (1 - 1e-3)


def test_the_scale_balances_features_of_activations_and_weights():
    c, g = covariance(8, 3), covariance(8, 4)
    scale = aligned_scale(c, g)
    assert float(scale.log().mean()) == pytest.approx(0.0, abs=1e-12)
    balance = ridged(c).diagonal() * scale**2 / (ridged(g).diagonal() / scale**2)
    assert torch.allclose(balance, balance[0].expand(8))
