"""The learned predictor: its published form, and its incremental form beside it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.errors import UsageError
from graphopt.ir.kv_policies import (
    STEPS,
    Filled,
    KVHeads,
    PageBudget,
    Predictor,
    Scoring,
)
from graphopt.ir.kv_policies.attention_cnn import new_weights, predict, weight_shapes
from graphopt.ir.kv_policies.checkpoint import read_checkpoint
from graphopt.ir.kv_policies.probabilities import max_pooled

F64 = torch.float64


class Published(nn.Module):
    """The network as it is published, with a number of channels."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv1d(32, 1, 1)

    def forward(self, x):
        return self.conv3(self.conv2(self.conv1(x).relu()).relu().mean(2))[:, 0]


def with_double_weights(policy, seed=3):
    weights = new_weights(policy.channels, seed)
    return policy.with_weights({name: x.double() for name, x in weights.items()})


def published(policy):
    network = Published(policy.channels).double()
    network.load_state_dict(dict(policy.weights))
    return network


def test_the_weights_are_those_of_the_published_form():
    network = Published(1)
    assert {name: tuple(x.shape) for name, x in network.state_dict().items()} == weight_shapes(1)
    assert sum(x.numel() for x in network.parameters()) == 4833
    network.load_state_dict(new_weights(1, seed=0))
    x = torch.rand(3, 1, 64, 20, generator=torch.Generator().manual_seed(0))
    weights = network.state_dict()
    assert torch.equal(predict(x, torch.ones(3, 20), weights), network(x))


def test_weights_of_another_form_are_refused():
    policy = Predictor(PageBudget(16, 8, 1, 1))
    with pytest.raises(UsageError, match="no weights of a predictor of 2 channels"):
        policy.with_weights(new_weights(1, seed=0))
    q, k, v = (torch.zeros(1, 1, 1, 4) for _ in range(3))
    with pytest.raises(UsageError, match="graphopt train-kv-policy"):
        policy.init(q, k, v, None, Scoring(1.0))


@pytest.mark.parametrize("values", ({"history": 4}, {"channels": 3}, {"calibrate_every": 0}))
def test_numbers_without_a_meaning_are_refused(values):
    with pytest.raises(UsageError, match="Give"):
        Predictor(PageBudget(16, 8, 1, 1), **values)


def expected_scores(policy, rows, first, last):
    """The published network on the pages that may be chosen: [G, pages], and which these are."""
    budget = policy.budget
    low = first // budget.page + budget.sink
    high = (last + 1) // budget.page - budget.local
    if high < low:
        return torch.zeros(rows[0][0].shape[0], 0, dtype=F64), slice(0, 0)
    pages = max(x.shape[1] for x, _ in rows)
    stacks = [
        torch.stack(
            [nn.functional.pad(row[n].to(F64), (0, pages - row[n].shape[1])) for row in rows], 1
        )
        for n in range(policy.channels)
    ]
    x = torch.stack(stacks, 1)[..., low : high + 1]
    with torch.no_grad():
        return published(policy)(x), slice(low, high + 1)


def next_row(before, probs, read, channels):
    """What the network is shown of a row, by the words: averages with two channels."""
    if channels == 1:
        return probs * read
    average = torch.where(before > 0, 0.2 * probs + 0.8 * before**4, probs)
    return torch.where(read, average**0.25, before)


@pytest.mark.parametrize("channels", (1, 2))
@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.data())
def test_the_incremental_form_is_the_batch_form(channels, data):
    """Random slides, pages that open, rows of unequal length, calibration now and then, in fp64."""
    seed = data.draw(st.integers(0, 99))
    page, room = data.draw(st.sampled_from((1, 2, 3))), data.draw(st.booleans())
    budget = PageBudget(page, 5, data.draw(st.integers(0, 1)), data.draw(st.integers(1, 2)))
    policy = with_double_weights(Predictor(budget, history=8, channels=channels), seed)
    draw = torch.Generator().manual_seed(seed)
    prompt, steps = 9, 14
    q, k = torch.randn(2, 2, 4, prompt + steps, 4, generator=draw, dtype=F64)
    k = k[:, :2]
    mask = torch.ones(2, prompt + steps, dtype=torch.int64)
    mask[1, : data.draw(st.integers(0, 7))] = 0
    first = Filled.of_mask(mask).first_B
    slots = 40 if room else prompt
    padded = nn.functional.pad(k[:, :, :prompt], (0, 0, 0, slots - prompt))
    seen = nn.functional.pad(mask[:, :prompt], (0, slots - prompt))
    state = policy.init(q[:, :, prompt - 8 : prompt], padded, padded, seen, Scoring(0.5))

    # What was read of every row's history, written down row by row.
    rows, compared = [[], []], 0
    for b in range(2):
        for now in range(prompt - 8, prompt):
            lengths = Filled(first, torch.full((2,), now), now + 1)
            probs = max_pooled(
                q[:, :, now : now + 1], k[:, :, : now + 1], lengths, page, Scoring(0.5)
            )[b, :, 0]
            read = lengths.present_BN(page)[b].expand(2, -1)
            before = torch.zeros_like(probs)
            if rows[b]:
                before[:, : rows[b][-1][0].shape[1]] = rows[b][-1][0]
            rows[b].append((next_row(before, probs, read, channels), read))
    for now in range(prompt, prompt + steps):
        lengths = Filled(first, torch.full((2,), now), 40 if room else now + 1)
        new = k[:, :, now : now + 1]
        pages = lengths.pages(page)
        probs = torch.rand(2, 2, pages, generator=draw, dtype=F64)
        dense = data.draw(st.integers(0, 3)) == 0
        if dense:
            state = policy.calibrate(state, probs, new, lengths)
            selected = torch.arange(pages).expand(2, 2, -1)
        else:
            selected = policy.select(state, None, None, lengths, Scoring(0.5))
            taken = probs.gather(2, selected.clamp(min=0))
            state = policy.observe(state, selected, taken, new, lengths)
        for b in range(2):
            before = torch.zeros(2, pages, dtype=F64)
            before[:, : rows[b][-1][0].shape[1]] = rows[b][-1][0]
            read = torch.zeros(2, pages, dtype=torch.bool)
            for g in range(2):
                named = selected[b, g][selected[b, g] >= 0]
                if dense:
                    named = named[lengths.present_BN(page)[b]]
                read[g, named] = True
            rows[b] = [*rows[b][1:], (next_row(before, probs[b], read, channels), read)]
            expected, where = expected_scores(policy, rows[b], int(first[b]), now)
            difference = (state["scores"][b, :, where] - expected).abs()
            assert difference.sum() <= 1e-12
            compared += difference.numel()
    assert compared > steps
    assert state[STEPS].tolist() == [steps, steps]


def test_the_history_after_a_prompt_is_causal():
    """A row is what its query saw, whatever came behind it."""
    policy = with_double_weights(Predictor(PageBudget(2, 5, 0, 1), history=8))
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 12, 4, generator=draw, dtype=F64)
    one = policy.init(q[:, :, -8:], k, k, None, Scoring(0.5))
    changed = k.clone()
    changed[:, :, 9:] = 7
    other = policy.init(q[:, :, -8:], changed, k, None, Scoring(0.5))
    # Rows are of the queries 4 to 11: the first five see keys up to 8.
    assert torch.equal(one["history"][:, :, :5], other["history"][:, :, :5])
    assert not torch.equal(one["history"][:, :, 5:], other["history"][:, :, 5:])
    for r in range(8):
        assert torch.equal(one["observed"][0, 0, r], torch.arange(6) <= (4 + r) // 2)
    assert (one["history"][~one["observed"]] == 0).all()


def test_calibrated_at_every_step_the_history_is_the_average_of_the_dense_trace():
    policy = with_double_weights(Predictor(PageBudget(2, 5, 1, 1), 1, history=8))
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 30, 4, generator=draw, dtype=F64)
    state = policy.init(q[:, :, 2:10], k[:, :, :10], k[:, :, :10], None, Scoring(0.5))
    for now in range(10, 30):
        assert bool(policy.due(state, layer=3))
        lengths = Filled.all_of(k[:, :, : now + 1])
        probs = max_pooled(q[:, :, now : now + 1], k[:, :, : now + 1], lengths, 2, Scoring(0.5))
        state = policy.calibrate(state, probs[:, :, 0], k[:, :, now : now + 1], lengths)
    lengths = Filled.all_of(k)
    trace = max_pooled(q[:, :, 2:], k, lengths, 2, Scoring(0.5))  # of the prompt's rows on
    averages = [torch.zeros_like(trace[:, :, 0])]
    for row in range(28):
        averages.append(next_row(averages[-1], trace[:, :, row], trace[:, :, row] > 0, 2))
    slots = (torch.arange(8) + 20) % 8  # the oldest row's first
    # A softmax over 30 keys or over fewer: a rounding or two apart, in sums of 28.
    expected = torch.stack(averages[-8:], 2)
    assert (state["history"][:, :, slots] - expected).abs().max() < 1e-14
    assert bool(state["observed"][:, :, slots[-1]].all())


def test_a_page_that_was_not_read_is_not_a_page_without_attention():
    policy = with_double_weights(Predictor(PageBudget(1, 2, 0, 1), None, history=8))
    k = torch.zeros(1, 1, 9, 4, dtype=F64)
    state = policy.init(k[:, :, :8], k[:, :, :8], k[:, :, :8], None, Scoring(1.0))
    lengths = Filled.all_of(k)
    selected = torch.tensor([[[3, 8]]])
    probs = torch.tensor([[[0.0, 1.0]]], dtype=F64)
    after = policy.observe(state, selected, probs, k[:, :, -1:], lengths)
    row, read = after["history"][0, 0, 0], after["observed"][0, 0, 0]
    before = state["history"][0, 0, 7]
    assert 0 < row[3] < before[3] and read[3] and not read[2]
    assert row[2] == before[2] > 0  # held, and marked


def test_the_state_survives_saving():
    import safetensors.torch

    policy = with_double_weights(Predictor(PageBudget(2, 5, 1, 1), history=8))
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 30, 4, generator=draw, dtype=F64)
    state = policy.init(q[:, :, 2:10], k[:, :, :10], k[:, :, :10], None, Scoring(0.5))
    again = safetensors.torch.load(safetensors.torch.save(state))
    for now in range(10, 14):
        lengths = Filled.all_of(k[:, :, : now + 1])
        selected = policy.select(state, None, None, lengths, Scoring(0.5))
        assert torch.equal(selected, policy.select(again, None, None, lengths, Scoring(0.5)))
        probs = torch.rand(selected.shape, generator=draw, dtype=F64)
        state = policy.observe(state, selected, probs, k[:, :, now : now + 1], lengths)
        again = policy.observe(again, selected, probs, k[:, :, now : now + 1], lengths)
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_the_published_form_has_no_marks():
    policy = with_double_weights(Predictor(PageBudget(1, 2, 0, 1), history=8, channels=1))
    heads = KVHeads(1, 1, 4, 4, F64)
    assert "observed" not in policy.state_types(heads, 9, 1)
    two = dataclasses.replace(policy, channels=2)
    assert "observed" in two.state_types(heads, 9, 1)
    assert policy.weight_types(heads)["conv1.weight"] == ((16, 1, 3, 3), F64)
    assert two.weight_types(heads)["conv1.weight"] == ((16, 2, 3, 3), F64)


def test_a_checkpoint_ships_for_the_demo_and_beat_ema_where_it_was_held_out():
    shipped = read_checkpoint("demo")
    heads = KVHeads(3, 9, 64, 64, torch.float16)
    policy = shipped.policy(Predictor(PageBudget(16, 8, 1, 2)), heads, "demo")
    assert policy.weights is not None and set(policy.weights) == set(weight_shapes(2))
    recall = shipped.about["recall"]
    assert all(recall["predictor"][share] > recall["ema"][share] for share in recall["ema"])
