"""Grids and GPTQ: against brute force, and that no step of the search makes it worse."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from imitated_streams import imitated_streams

from graphopt.ir.encoding import stored_scales
from graphopt.solvers.gptq import (
    _descend_columns,
    _round_columns,
    best_scales,
    damped,
    gptq,
    output_error,
    refine,
)
from graphopt.solvers.grids import Grid, best_grid, full_range
from graphopt.support.recorded import Recorded

BITS = st.sampled_from((2, 3, 4, 8))
F64 = torch.float64


def random(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(length, tokens=400, seed=0):
    """Return second moments of features that a few directions decide."""
    mixing = random(length, length, seed=seed) * torch.logspace(0, -2, length, dtype=F64)
    x = random(tokens, length, seed=seed + 1) @ mixing
    return damped(x.T @ x)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(BITS, st.sampled_from((1, 3, 4)), st.booleans(), st.booleans(), st.integers(0, 99))
def test_codes_are_the_nearest_of_all(bits, group, symmetric, negative, seed):
    matrix = random(3, 2 * group, seed=seed)
    grid = full_range(matrix, bits, group, symmetric)
    if negative:
        grid = Grid(-grid.scales, grid.zeros, bits, group, symmetric)
    codes = grid.codes(matrix)
    assert codes.eq(codes.round()).all() and codes.min() >= 0 and codes.max() < 2**bits
    every = torch.arange(2**bits, dtype=F64)
    for row, column in itertools.product(range(3), range(2 * group)):
        at = column // group
        values = (every - grid.zeros[row, at]) * grid.scales[row, at]
        distance = (values - matrix[row, column]).abs()
        found = (grid.values(codes)[row, column] - matrix[row, column]).abs()
        assert float(found) == pytest.approx(float(distance.min()), abs=1e-12)
    scales, zeros = grid.by_column(torch.arange(2 * group))
    assert ((codes - zeros.T) * scales.T).equal(grid.values(codes))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(BITS, st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_searched_range_is_no_worse_than_the_whole(bits, symmetric, weighted, seed):
    matrix = random(4, 24, seed=seed) ** 3
    importance = random(24, seed=seed + 1).square() if weighted else None
    weighting = torch.ones(24, dtype=F64) if importance is None else importance
    errors = []
    for grid in (
        full_range(matrix, bits, 12, symmetric),
        best_grid(matrix, bits, 12, symmetric, importance),
    ):
        left = (grid.values(grid.codes(matrix)) - matrix).square() * weighting
        errors.append(left.unflatten(-1, (2, 12)).sum(-1))
    assert (errors[1] <= errors[0] * (1 + 1e-9)).all()


def test_a_group_of_zeros_and_scales_beyond_a_dtype():
    for symmetric in (True, False):
        for search in (full_range, best_grid):
            grid = search(torch.zeros(2, 8), 4, 4, symmetric)
            assert grid.scales.eq(1).all() and not grid.values(grid.codes(torch.zeros(2, 8))).any()
    scales = stored_scales(full_range(torch.tensor([[1e-9, 1e9]]), 4, 1, True).scales, torch.half)
    assert scales.isfinite().all() and scales.ne(0).all()
    small = torch.tensor([7.9e-6, 1e-12])
    stored = stored_scales(small, torch.float16).double()
    assert stored[0] == pytest.approx(7.9e-6, rel=0.01) and stored[1] == 2.0**-24


@given(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), st.integers(0, 99))
def test_stored_scales_are_numbers_of_fp16_where_it_has_them(dtype, seed):
    scales = random(1, 64, seed=seed) * 10.0 ** random(1, 64, seed=seed + 100).mul(3)
    stored = stored_scales(scales, dtype)
    assert stored.dtype == dtype and stored.sign().double().equal(scales.sign())
    half = torch.finfo(torch.float16)
    inside = (scales.abs() >= half.tiny) & (scales.abs() <= half.max / 2)
    assert stored[inside].double().equal(stored[inside].half().double())
    # Two roundings, to the digits of fp16 and to those of the dtype.
    error = 2.0**-11 + torch.finfo(dtype).eps
    normal = inside | (torch.tensor(dtype != torch.float16) & (scales.abs() > 1e-30))
    assert ((stored.double() - scales).abs() <= error * scales.abs())[normal].all()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.sampled_from((2, 3)), st.booleans(), st.integers(0, 99))
def test_gptq_comes_near_the_best_of_all_codes(bits, symmetric, seed):
    """Of one row of five elements all codes are tried; never worse than nearest by much."""
    matrix, moments = random(1, 5, seed=seed), correlated(5, seed=seed)
    grid = full_range(matrix, bits, 5, symmetric)
    every = torch.cartesian_prod(*[torch.arange(2**bits, dtype=F64)] * 5)
    left = (every - grid.zeros) * grid.scales - matrix
    least = float(((left @ moments) * left).sum(-1).min())
    codes = gptq(matrix, moments, grid)
    found = output_error(grid.values(codes) - matrix, moments)
    assert found >= least * (1 - 1e-9)
    refined, codes = refine(matrix, moments, grid, codes)
    assert output_error(refined.values(codes) - matrix, moments) <= found * (1 + 1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_change_less_than_by_nearest_codes(bits, group, symmetric):
    matrix, moments = random(24, 64), correlated(64)
    grid = best_grid(matrix, bits, group, symmetric)
    nearest = output_error(grid.values(grid.codes(matrix)) - matrix, moments)
    codes = gptq(matrix, moments, grid)
    fed = output_error(grid.values(codes) - matrix, moments)
    refined, codes = refine(matrix, moments, grid, codes)
    last = output_error(refined.values(codes) - matrix, moments)
    assert last <= fed < 0.7 * nearest


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_correlations_it_is_the_nearest_code(symmetric):
    matrix, moments = random(6, 40), torch.eye(40, dtype=F64) * 3
    grid = full_range(matrix, 3, 20, symmetric)
    codes = grid.codes(matrix)
    assert gptq(matrix, moments, grid).equal(codes)
    # With scales of their own, codes still are the nearest.
    refined, found = refine(matrix, moments, grid, codes, sweeps=20)
    assert found.equal(refined.codes(matrix))


def test_scales_are_those_of_least_squares():
    """Against a regression of one row's products on those of its groups' codes."""
    matrix, moments = random(3, 12), correlated(12)
    grid = full_range(matrix, 3, 4, False)
    codes = grid.codes(matrix)
    solved = best_scales(matrix, moments, grid, codes)
    root = torch.linalg.cholesky(moments)
    for row in range(3):
        columns = torch.zeros(12, 3, dtype=F64)
        for group in range(3):
            part = slice(4 * group, 4 * group + 4)
            columns[part, group] = codes[row, part] - grid.zeros[row, group]
        wanted = torch.linalg.lstsq(root.T @ columns, root.T @ matrix[row][:, None]).solution[:, 0]
        torch.testing.assert_close(solved.scales[row], wanted, rtol=1e-6, atol=1e-9)


def test_moments_that_are_not_numbers_are_refused_and_dead_features_are_no_trouble():
    gram = torch.eye(4, dtype=F64)
    gram[1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        damped(gram)
    matrix = random(2, 4)
    for gram in (torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 0.0, 2.0, 0.0]))):
        grid = full_range(matrix, 4, 4, True)
        codes = gptq(matrix, damped(gram), grid)
        assert codes.equal(grid.codes(matrix))


class StandIn:
    """A CUDA graph that runs a function again on the places that it was recorded with."""

    def __init__(self):
        self.recorded = None

    def replay(self):
        recorded, work = self.recorded
        for place, value in zip(recorded._results, work(*recorded._places), strict=True):
            place.copy_(value)


@pytest.mark.parametrize("work", [_round_columns, _descend_columns])
def test_a_recording_is_given_its_operands_and_keeps_none_of_its_results(work):
    """On a stand-in for a GPU: what is replayed is what is computed, for other operands too."""
    columns, rows = 5, 7
    plain = functools.partial(work, last=7)

    def operands(seed):
        square = correlated(columns, seed=seed)
        scales = random(columns, rows, seed=seed).abs() + 0.1
        first = [random(columns, rows, seed=seed + 1)]
        first += [random(columns, rows, seed=seed + 2)] if work is _descend_columns else []
        return [*first, square, scales, torch.full_like(scales, 4)]

    with imitated_streams(StandIn):
        recorded = Recorded(plain, operands(0))
    recorded._graph.recorded = recorded, plain
    kept = []
    for seed in (3, 4):
        expected = plain(*(tensor.clone() for tensor in operands(seed)))
        found = recorded(operands(seed))
        kept.append((found, [tensor.clone() for tensor in found]))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    for found, as_they_were in kept:
        assert all(map(torch.equal, found, as_they_were))
