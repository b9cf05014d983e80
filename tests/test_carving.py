"""Marks and balanced clusters against brute force and the assignment problem."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import PassError
from graphopt.passes.carve_moe.division import (
    cluster,
    cluster_centres,
    cosine_hidden,
    indicator_counts,
    overlaps,
    top_k_indicators,
)
from graphopt.solvers.assignment import balanced_assignment


def as_matrix(indicators, width):
    """Return the indicators as a matrix of 0 and 1."""
    return torch.zeros(len(indicators), width).scatter_(1, indicators, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 7))
def test_indicators_are_those_of_a_loop_over_tokens_ties_to_the_lowest_index(seed, width, count):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (9, width), generator=generator).float()
    count = min(count, width)
    indicators = top_k_indicators(hidden, count)
    for row, found in zip(hidden.abs().tolist(), indicators.tolist(), strict=True):
        expected = sorted(range(width), key=lambda i: (-row[i], i))[:count]
        assert sorted(found) == sorted(expected)
    counts = indicator_counts(indicators, width)
    assert int(counts.sum()) == 9 * count
    assert torch.equal(counts.float(), as_matrix(indicators, width).sum(0))


def test_more_indicators_than_neurons_are_refused():
    with pytest.raises(PassError, match="5 of 4 neurons"):
        top_k_indicators(torch.ones(2, 4), 5)


@pytest.mark.parametrize("gated", [True, False])
def test_activations_of_cosines_know_no_lengths(gated):
    generator = torch.Generator().manual_seed(0)
    x, gate, up = (torch.randn(n, 12, generator=generator) for n in (7, 9, 9))
    found = cosine_hidden(x, gate if gated else None, up, "silu")
    x64, gate64, up64 = (F.normalize(rows.double(), dim=-1) for rows in (x, gate, up))
    expected = F.silu(x64 @ (gate64 if gated else up64).t())
    if gated:
        expected = expected * (x64 @ up64.t())
    assert torch.allclose(found.double(), expected, atol=1e-6)
    longer = [rows * (1 + torch.arange(len(rows))[:, None]) for rows in (x, gate, up)]
    again = cosine_hidden(longer[0], longer[1] if gated else None, longer[2], "silu")
    assert torch.allclose(again, found, atol=1e-6)


def test_overlaps_are_products_of_the_indicators_matrix():
    generator = torch.Generator().manual_seed(0)
    indicators = top_k_indicators(torch.randn(20, 11, generator=generator), 4)
    centres = torch.rand(20, 3, generator=generator)
    expected = as_matrix(indicators, 11).t() @ centres
    assert torch.allclose(overlaps(indicators, centres, 11), expected, atol=1e-5)


def best_sum(gain, sizes):
    """Return the largest sum of whole gains, by networkx' network simplex."""
    graph = networkx.DiGraph()
    for row, gains in enumerate(gain.tolist()):
        graph.add_node(("row", row), demand=-1)
        for column, value in enumerate(gains):
            graph.add_edge(("row", row), ("column", column), capacity=1, weight=-value)
    for column in range(gain.shape[1]):
        graph.add_node(("column", column), demand=sizes[column])
    return -networkx.min_cost_flow_cost(graph)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any),
    st.sampled_from([2, 4, 10**6]),
)
def test_an_assignment_is_as_good_as_any(seed, sizes, most):
    gain = np.random.default_rng(seed).integers(0, most, (sum(sizes), len(sizes)))
    place = balanced_assignment(torch.from_numpy(gain), sizes).numpy()
    assert np.bincount(place, minlength=len(sizes)).tolist() == sizes
    assert gain[np.arange(len(gain)), place].sum() == best_sum(gain, sizes)


def test_overlap_and_both_distances_have_one_optimum():
    generator = torch.Generator().manual_seed(3)
    indicators = top_k_indicators(torch.randn(40, 12, generator=generator), 3)
    columns, size = 3, 4
    # Centres of sixteenths, so that every distance is a whole number of 1/256.
    centres = torch.randint(0, 17, (40, columns), generator=generator) / 16
    sizes = [size] * columns
    place = balanced_assignment(overlaps(indicators, centres, 12), sizes)
    for power in (1, 2):
        apart = (as_matrix(indicators, 12).t()[:, :, None] - centres[None]).abs().pow(power).sum(1)
        whole = (apart.double() * 256).long()
        assert int(whole[torch.arange(12), place].sum()) == -best_sum(-whole, sizes)


def test_what_does_not_fill_the_experts_is_refused():
    with pytest.raises(PassError, match="7 neurons do not fill 2 experts with room for 6"):
        balanced_assignment(torch.ones(7, 2), [3, 3])
    with pytest.raises(PassError, match="NaN or infinity"):
        balanced_assignment(torch.full((4, 2), float("nan")), [2, 2])


def test_neurons_that_fire_together_are_one_expert():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randperm(24, generator=generator).view(3, 8)
    hidden = 0.1 * torch.randn(90, 30, generator=generator)
    for token in range(90):
        hidden[token, groups[token % 3]] += 3.0
        # One of each group fires a little more often, so that centres begin in all three.
        hidden[token, groups[(token + 1) % 3, 0]] += 5.0
    indicators = top_k_indicators(hidden, 9)
    found = cluster([indicators], torch.arange(24), 30, 3)
    centres = cluster_centres(indicators, found, 30)
    assert {tuple(g) for g in found.tolist()} == {tuple(g) for g in groups.sort(1).values.tolist()}
    assert centres.shape == (90, 3) and float(centres.max()) == 1.0
    # Tokens may come in batches.
    assert torch.equal(found, cluster(indicators.split(40), torch.arange(24), 30, 3))
