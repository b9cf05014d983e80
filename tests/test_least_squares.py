"""Closed-form fits against a solver, sums over batches, and the strength that is chosen."""

from __future__ import annotations

import pytest
import torch

from graphopt.solvers.least_squares import RIDGES, LeastSquares, best_ridge


def sums_of(features, targets):
    sums = LeastSquares()
    sums.add(features, targets)
    return sums


def test_sums_over_batches_solve_the_least_squares_with_a_pull():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 8, 6, generator=generator)
    targets = torch.randn(5, 8, 4, generator=generator)
    sums = sums_of(features[0], targets[0]) + sums_of(features[1], targets[1])
    for part in range(2, 5):
        sums.add(features[part], targets[part])
    other = sums.retarget()
    for part in range(5):
        other.add_targets(features[part], targets[part].exp())
    x = features.double().flatten(0, 1)
    for found_by, y in ((sums, targets), (other, targets.exp())):
        y = y.double().flatten(0, 1)
        for ridge in RIDGES:
            strength = ridge * float((x.T @ x).diagonal().mean())
            rows = torch.cat([x, strength**0.5 * torch.eye(6, dtype=torch.float64)])
            expected = torch.linalg.lstsq(rows, torch.cat([y, y.new_zeros(6, 4)])).solution
            found = found_by.solve(ridge)
            # Sums in fp32 over 40 tokens, and a condition of at most 10.
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
            left = float((y - x @ found).square().sum())
            assert found_by.error(found) == pytest.approx(left, rel=1e-4)
        assert found_by.error(None) == pytest.approx(float(y.square().sum()), rel=1e-5)
        assert found_by.count == 40


def test_noise_is_fitted_by_a_strong_pull_or_not_at_all_and_what_is_true_by_a_weak_one():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 60, 40, generator=generator)
    noise = torch.randn(2, 60, 3, generator=generator)
    truth = features @ torch.randn(40, 3, generator=generator)
    strengths = []
    for targets in (truth + 0.01 * noise, truth + 8 * noise):
        ridge, error = best_ridge(*map(sums_of, features, targets))
        assert ridge is not None and error < float(targets[1].square().sum())
        strengths.append(ridge)
    assert strengths[0] < strengths[1]
    assert best_ridge(*map(sums_of, features, torch.stack([truth[0], -truth[1]])))[0] is None
