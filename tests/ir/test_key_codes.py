"""Keys in few bits, by which pages are selected: beside codes and estimates key by key."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import UsageError
from graphopt.ir.kv_policies import (
    Filled,
    KeyCodes,
    OracleTopK,
    PageBudget,
    PageRange,
    Scoring,
    select_pages,
)
from graphopt.ir.kv_policies.key_codes import PRIOR_KEYS, STEP_OF_BITS
from graphopt.ir.kv_policies.oracle import page_mass

F64 = torch.float64


def drawn(seed, tokens, width=8, rows=2):
    """Queries of four heads over keys of two, of features of very different sizes, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1, 1, width, dtype=F64)[torch.randperm(width, generator=generator)]
    q = torch.randn(rows, 4, tokens, width, dtype=F64, generator=generator)
    k = torch.randn(rows, 2, tokens, width, dtype=F64, generator=generator) * sizes + 2 * sizes
    return q, k


def expected_codes(q, k, group, now, queries, prompt, first):
    """Of one row and key head: the levels that each key up to `now` stands for, by definition."""
    width = k.shape[-1]
    padded = -(-width // 8) * 8
    keys = k[first:prompt]
    centre = keys.mean(0)
    size = keys.square().sum() / len(keys) / padded
    variance = ((keys - centre).square().sum(0) + PRIOR_KEYS * size) / (len(keys) + PRIOR_KEYS)
    asked = q[2 * group : 2 * group + 2, max(first, prompt - queries) : prompt]
    counts = asked.square().sum((0, 1)) * variance
    order = sorted(range(width), key=lambda d: -float(counts[d]))
    levels = centre.repeat(now - first, 1)
    for place, d in enumerate(order[: 3 * padded // 4]):
        bits = 4 if place < padded // 4 else 2
        step, scale = STEP_OF_BITS[bits], float(variance[d].sqrt())
        for t in range(first, now):
            code = math.floor(float(k[t, d] - centre[d]) / scale / step) + 2 ** (bits - 1)
            code = min(max(code, 0), 2**bits - 1)
            levels[t - first, d] += (code - (2**bits - 1) / 2) * step * scale
    return levels


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.sampled_from((1, 2, 3)), st.sampled_from((4, 8, 10)))
def test_pages_are_those_of_the_softmax_of_estimates(seed, page, width):
    """With padding in front, behind a prompt and in the steps after it, and in more room."""
    q, k = drawn(seed, 18, width)
    mask = torch.ones(2, 18, dtype=torch.int64)
    mask[1, :5] = 0
    first, prompt = torch.tensor([0, 5]), 11
    policy = KeyCodes(PageBudget(page, 4, 0, 1), queries=4)
    scoring = Scoring(0.3, softcap=2.0)
    state = policy.init(
        q[:, :, prompt - 4 : prompt], *(k[:, :, :prompt],) * 2, mask[:, :prompt], scoring
    )
    for now in range(prompt, 18):
        lengths = Filled(first, torch.full((2,), now), now + 1)
        shares = torch.zeros(2, 2, lengths.pages(page), dtype=F64)
        for b, g, head in torch.cartesian_prod(*map(torch.arange, (2, 2, 2))).tolist():
            start = int(first[b])
            levels = expected_codes(q[b], k[b, g], g, now, 4, prompt, start)
            scores = 2 * (levels @ q[b, 2 * g + head, now] * scoring.scale / 2).tanh()
            for t, share in enumerate(scores.softmax(-1).tolist()):
                shares[b, g, (start + t) // page] += share / 2
        expected = select_pages(shares, policy.budget, lengths)
        query = q[:, :, now : now + 1]
        assert torch.equal(policy.select(state, query, None, lengths, scoring), expected)
        room = {**state, "codes": torch.nn.functional.pad(state["codes"], (0, 0, 0, 3))}
        wide = Filled(first, lengths.last_B, now + 1 + 2 * page)
        assert torch.equal(policy.select(room, query, None, wide, scoring), expected)
        state = policy.observe(state, expected, None, k[:, :, now : now + 1], lengths)


def test_the_state_reads_an_eighth_of_the_keys_in_16_bits():
    q, k = (x.half() for x in drawn(0, 64, 64))
    state = KeyCodes(PageBudget(4, 4, 0, 1)).init(q, k, k, None, Scoring(1.0))
    assert state["codes"].nbytes * 8 == k.nbytes


def test_codes_find_attention_that_ranges_of_pages_do_not():
    """Of 512 keys of features of very different sizes 48 are read: nearly all that can be had.

    The state of both is as large: two bits of a feature of each key, or two numbers of 16 bits of a
    feature of each 16 keys.
    """
    q, k = drawn(1, 512, 64, rows=16)
    scoring, lengths = Scoring(0.05), Filled.all_of(k)
    mass = {}
    for kind in (OracleTopK, KeyCodes, PageRange):
        policy = kind(PageBudget(16, 4, 0, 1))
        state = policy.init(q[:, :, -64:], k[:, :, :-1], k[:, :, :-1], None, scoring)
        taken = policy.select(state, q[:, :, -1:], k, lengths, scoring)
        pages = page_mass(q[:, :, -1:], k, lengths, 16, scoring)
        mass[policy.kind] = float(pages.gather(2, taken).sum(-1).mean())
    assert mass["key-codes"] > 0.98 * mass["oracle"]
    assert mass["page-range"] < 0.9 * mass["oracle"]


def test_a_text_of_one_token_and_equal_keys_have_finite_codes():
    for k in (torch.randn(1, 2, 1, 8), torch.ones(1, 2, 9, 8), torch.zeros(1, 2, 9, 8)):
        q = torch.ones(1, 4, k.shape[2], 8)
        policy = KeyCodes(PageBudget(2, 2, 0, 1))
        state = policy.init(q, k, k, None, Scoring(1.0))
        assert all(bool(x.isfinite().all()) for x in state.values())
        keys = torch.cat((k, k[:, :, -1:] + 1), 2)
        lengths = Filled.all_of(keys)
        state = policy.observe(state, None, None, keys[:, :, -1:], lengths)
        selected = policy.select(state, q[:, :, -1:], None, lengths, Scoring(1.0))
        assert int(selected.max()) == (lengths.slots - 1) // 2


def test_no_queries_are_refused():
    with pytest.raises(UsageError, match="Give 1 or more"):
        KeyCodes(PageBudget(2, 2, 0, 1), queries=0)
