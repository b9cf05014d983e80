"""Policies on made attention that has one of the patterns of attention over time, and no other.

Yang et al. (arXiv 2502.04077) name three: what was attended to is attended to again (re-access),
attention moves on by a token a step (sequential), and it comes back after some steps (seasonal).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from graphopt.ir.kv_policies import (
    Ema,
    Filled,
    KVPolicy,
    LastRow,
    PageBudget,
    Predictor,
    Scoring,
    SinkLocal,
)
from graphopt.ir.kv_policies.attention_cnn import FEATURES, weight_shapes
from graphopt.ir.kv_policies.base import page_values
from graphopt.ir.kv_policies.pages import take_pages

PAGE, PAGES, STEPS, PERIOD = 4, 40, 30, 6
BUDGET = PageBudget(PAGE, pages=6, sink=1, local=1)
KEYS = torch.zeros(1, 1, 1, 4)


def trace(pattern: str) -> Tensor:
    """Return the attention mass [steps, pages] of 30 steps: half of it on three pages.

    The rest lies evenly on the others.
    """
    hot = torch.tensor([9, 18, 27])
    mass = torch.full((STEPS, PAGES), 0.5 / PAGES)
    for step in range(STEPS):
        if pattern == "sequential":  # a page is reached every PAGE steps
            here = hot + step // PAGE
        elif pattern == "seasonal":  # one of three sets of pages, each for some steps
            here = hot + 2 * (step // PERIOD % 3)
        else:
            here = hot
        mass[step, here] += 0.5 / len(hot)
    return mass / mass.sum(1, keepdim=True)


def recall(policy: KVPolicy, mass: Tensor) -> float:
    """Return the mass of the pages that steps read over that of the best as many, a mean.

    Steps that are due for calibration read everything and do not count.
    """
    lengths = Filled(torch.zeros(1).long(), torch.full((1,), PAGES * PAGE - 1), PAGES * PAGE)
    state = begun(policy, mass[0])
    shares = []
    for row in mass[1:]:
        probabilities = row.view(1, 1, -1)
        due = policy.due(state)
        if due is not None and bool(due.any()):
            state = policy.calibrate(state, probabilities, KEYS, lengths)
            continue
        selected = policy.select(state, None, None, lengths, Scoring(1.0))
        listed = selected[0, 0][selected[0, 0] >= 0]
        assert len(listed) == BUDGET.pages == len(set(listed.tolist()))
        best = row[1:-1].topk(BUDGET.selectable).values.sum() + row[0] + row[-1]
        shares.append(float(row[listed].sum() / best))
        read = take_pages(probabilities, selected)
        state = policy.observe(state, selected.expand(1, 1, -1), read, KEYS, lengths)
    return sum(shares) / len(shares)


def begun(policy: KVPolicy, row: Tensor) -> dict[str, Tensor]:
    """Return the state behind a prompt whose last query attended as a row of a trace says."""
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, PAGES * PAGE, 4)
    # Of one feature, so that the softmax of its scores is the row; a page's keys are alike.
    k[..., 0] = row.clamp(min=1e-9).log().repeat_interleave(PAGE)
    q[..., 0] = 1.0
    return policy.init(q, k, k, None, Scoring(1.0))


def last_average() -> Predictor:
    """Return a predictor whose network gives the mean of the rows that it is shown."""
    weights = {name: torch.zeros(shape) for name, shape in weight_shapes(2).items()}
    weights["conv1.weight"][0, 0, 1, 1] = 1.0
    weights["conv2.weight"][0, 0, 1, 1] = 1.0
    weights["conv3.weight"][0, 0, 0] = 1.0
    assert len(weights["conv3.weight"][0]) == FEATURES
    return dataclasses.replace(Predictor(BUDGET), history=8).with_weights(weights)


LEARNING = [
    LastRow(BUDGET, calibrate_every=5),
    Ema(BUDGET, calibrate_every=5),
    last_average(),
]


@pytest.mark.parametrize("policy", LEARNING, ids=lambda policy: policy.kind)
def test_what_is_attended_to_again_is_read_in_full(policy: KVPolicy) -> None:
    assert recall(policy, trace("re-access")) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("pattern", ["sequential", "seasonal"])
def test_what_is_new_is_seen_the_later_the_longer_a_policy_remembers(pattern: str) -> None:
    """The last row alone, an average of some, and here the mean of eight averages."""
    mass = trace(pattern)
    last_row, ema, predictor = (recall(policy, mass) for policy in LEARNING)
    nothing = recall(SinkLocal(BUDGET), mass)
    assert 1 > last_row > ema + 0.05 > predictor + 0.1 > nothing + 0.2


@pytest.mark.parametrize("pattern", ["sequential", "seasonal"])
def test_dense_steps_find_what_selected_ones_never_read(pattern: str) -> None:
    mass = trace(pattern)
    blind, seldom, often = (
        recall(LastRow(BUDGET, calibrate_every=every), mass) for every in (None, 5, 3)
    )
    assert blind + 0.1 < seldom < often - 0.1


def test_calibrated_at_every_step_nothing_is_selected() -> None:
    policy = Ema(BUDGET, calibrate_every=1)
    state = begun(policy, trace("re-access")[0])
    assert bool(policy.due(state).all())
    known = page_values(state, "probability", PAGES)[0, 0]
    # The prompt's last query stands alone: its row is the average. A page has the largest of
    # probabilities of keys that are alike, a quarter of its mass.
    torch.testing.assert_close(known, trace("re-access")[0] / PAGE, rtol=1e-5, atol=1e-7)
