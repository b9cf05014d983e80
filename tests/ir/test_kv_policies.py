"""KV policies: which pages are taken, and what each policy remembers, beside brute force."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import UsageError
from graphopt.ir import functional
from graphopt.ir.kv_policies import (
    POLICIES,
    STEPS,
    Dense,
    Ema,
    ExpectedAttention,
    Filled,
    KVHeads,
    LastRow,
    OracleTopK,
    OracleTopP,
    PageBudget,
    PageRange,
    Quest,
    Scoring,
    SinkLocal,
    SnapKV,
    page_probabilities,
    policy_from_dict,
    policy_to_dict,
    select_pages,
)
from graphopt.ir.kv_policies.attention_cnn import new_weights
from graphopt.ir.kv_policies.probabilities import max_pooled

F64 = torch.float64
MEASURING = {kind for kind, policy in POLICIES.items() if policy.measuring_only}


def small(kind, budget):
    """The policy of a kind, with weights where it has some."""
    policy = POLICIES[kind](budget)
    if kind == "predictor":
        policy = dataclasses.replace(policy, history=8).with_weights(new_weights(2, seed=1))
    return policy


def texts_of_every_length(padding):
    """400 rows of 1 to 400 tokens in as many slots, some of them padded in front."""
    last = torch.arange(400)
    first = torch.zeros_like(last)
    if padding:
        draws = torch.rand(400, generator=torch.Generator().manual_seed(1))
        first = (draws * (last + 1)).long()
    return Filled(first, last, 400)


def taken(selected, pages):
    """How often each page is named: [B, G, N]."""
    assert int(selected.max()) < pages
    counts = torch.zeros(*selected.shape[:2], pages + 1, dtype=torch.int64)
    index = torch.where(selected >= 0, selected, pages)
    return counts.scatter_add(2, index, torch.ones_like(index))[..., :pages]


@pytest.mark.parametrize("padding", (False, True))
@pytest.mark.parametrize("page", (1, 8, 16, 64))
def test_a_budget_of_everything_takes_every_page_once(page, padding):
    lengths = texts_of_every_length(padding)
    pages = lengths.pages(page)
    scores = torch.full((400, 2, pages), float("-inf"))
    selected = select_pages(scores, PageBudget(page, pages, 1, 1), lengths)
    assert (taken(selected, pages) == lengths.present_BN(page)[:, None]).all()


@pytest.mark.parametrize("padding", (False, True))
@pytest.mark.parametrize("page", (1, 8, 16, 64))
def test_sink_selectable_and_local_cover_every_token_once(page, padding):
    lengths = texts_of_every_length(padding)
    pages = lengths.pages(page)
    present = lengths.present_BN(page)[:, None]
    slot = torch.arange(400)
    real = (slot >= lengths.first_B[:, None]) & (slot <= lengths.last_B[:, None])
    first, last = ((x // page)[:, None, None] for x in (lengths.first_B, lengths.last_B))
    number = torch.arange(pages)
    for sink, local, selectable in ((0, 1, 0), (1, 2, 1), (2, 1, 3), (0, 1, 2)):
        budget = PageBudget(page, sink + local + selectable, sink, local)
        always = taken(select_pages(torch.full((400, 1, pages), torch.nan), budget, lengths), pages)
        fits = last - first < budget.pages
        expected = present & (fits | (number < first + sink) | (number > last - local))
        assert (always == expected).all()
        # What remains is selectable: any page of it that scores highest is taken.
        scores = torch.rand(400, 2, pages, generator=torch.Generator().manual_seed(2))
        counts = taken(select_pages(scores, budget, lengths), pages)
        assert (counts <= 1).all() and (counts[~present.expand_as(counts)] == 0).all()
        assert (
            counts.sum(-1) == torch.minimum(last - first + 1, torch.tensor(budget.pages))[..., 0]
        ).all()
        best = scores.masked_fill((always > 0) | ~present, -1.0)
        order = best.argsort(-1, descending=True)[..., :selectable]
        chosen = counts.gather(2, order).bool() | (best.gather(2, order) < 0)
        assert chosen.all()
        tokens = (counts[:, 0] * present[:, 0]).repeat_interleave(page, 1)[:, :400] * real
        assert (tokens <= 1).all() and tokens.gather(1, lengths.last_B[:, None]).all()


def test_of_equal_scores_the_first_page_comes_first_and_no_score_is_above_local():
    lengths = Filled(torch.tensor([0]), torch.tensor([9]), 10)
    budget = PageBudget(1, 4, 1, 1)
    assert select_pages(torch.zeros(1, 1, 10), budget, lengths).tolist() == [[[0, 1, 2, 9]]]
    scores = torch.full((1, 1, 10), float("inf"))
    assert select_pages(scores, budget, lengths).tolist() == [[[0, 1, 2, 9]]]
    scores[..., 2:] = torch.nan
    assert select_pages(scores, budget, lengths).tolist() == [[[0, 1, 9, -1]]]


def test_scores_of_fewer_pages_and_of_more_room():
    lengths = Filled(torch.tensor([0]), torch.tensor([8]), 9)
    budget = PageBudget(1, 3, 0, 1)
    grown = torch.tensor([[[1.0, 5.0, 2.0, 4.0]]])
    assert select_pages(grown, budget, lengths).tolist() == [[[1, 3, 8]]]
    room = dataclasses.replace(lengths, last_B=torch.tensor([3]), slots=20)
    assert select_pages(torch.arange(20.0).flip(0)[None, None], budget, room).tolist() == [
        [[0, 1, 3]]
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((16, 32, 64, 64), "A budget of 32 tokens per KV head is below sink plus local"),
        ((16, 100, 16, 16), "A budget of 100 tokens is no multiple of the page of 16 tokens"),
        ((16, 128, 8, 16), "A sink of 8 tokens is no multiple"),
        ((16, 128, 16, 0), "1 or more of local"),
        ((0, 128, 16, 16), "A page of 0 tokens"),
    ],
)
def test_a_budget_that_has_no_meaning_is_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        PageBudget.of(*arguments)


def test_budgets_are_tokens_per_kv_head():
    budget = PageBudget.of(16, 1024, 64, 64)
    assert (budget.pages, budget.sink, budget.local, budget.selectable) == (64, 4, 4, 56)
    assert budget.tokens == 1024


def test_lengths_of_a_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    lengths = Filled.of_mask(mask)
    assert lengths.first_B.tolist() == [2, 0] and lengths.last_B.tolist() == [4, 2]
    assert lengths.present_BN(2).tolist() == [[False, True, True], [True, True, False]]


def one_layer(seed=0, batch=2, groups=2, tokens=23, dim=8, rows=5, dtype=F64):
    """Queries of all tokens, keys and values of a layer; the second text is padded in front."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, groups * 2, tokens, dim, generator=draw, dtype=dtype)
    k, v = torch.randn(2, batch, groups, tokens, dim, generator=draw, dtype=dtype)
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[1, :6] = 0
    return q, k, v, mask


@pytest.mark.parametrize("form", ("plain", "softcap", "sinks"))
def test_page_maxima_give_the_max_pooled_softmax(form):
    """exp(page max - log-sum-exp) of the attention, and the policies' own softmax, in fp64."""
    q, k, v, mask = one_layer()
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(5), dtype=F64)
    scoring = Scoring(0.3, 2.0 if form == "softcap" else None, sinks if form == "sinks" else None)
    _, lse, maxima = functional.attention_results(
        q, k, v, None, mask, sinks=scoring.sinks_H, cached=False, lse=True, page_max=4,
        scale=scoring.scale, softcap=scoring.softcap,
    )  # fmt: skip
    emitted = page_probabilities(maxima, lse, 2)
    own = max_pooled(q, k, Filled.of_mask(mask), 4, scoring, mask)
    real = mask.bool()[:, None, :, None]
    # Two ways to one softmax of scores below 10: a few roundings of 1e-16 apart.
    assert (emitted - own)[real.expand_as(own)].abs().max() < 1e-14
    assert (own[~real.expand_as(own)] == 0).all()


def test_the_oracle_takes_what_no_other_choice_exceeds():
    """All choices of a small case are tried."""
    q, k, _, mask = one_layer(tokens=10)
    lengths, budget = Filled.of_mask(mask), PageBudget(2, 3, 0, 1)
    selected = OracleTopK(budget).select({}, q[:, :, -1:], k, lengths, Scoring(1.0))
    scores = torch.einsum("bghd,bgtd->bght", q[:, :, -1].unflatten(1, (2, 2)), k)
    scores = scores.masked_fill(mask[:, None, None] == 0, float("-inf"))
    mass = scores.softmax(-1).unflatten(-1, (5, 2)).sum(-1).mean(2)
    for b in range(2):
        for g in range(2):
            pages = [n for n in range(5) if n >= (0 if b == 0 else 3)]
            tried = [mass[b, g, [x, y, 4]].sum() for x in pages for y in pages if x < y < 4]
            best = max(tried) if tried else mass[b, g].sum()
            named = selected[b, g][selected[b, g] >= 0]
            assert float(mass[b, g, named].sum()) == pytest.approx(float(best), abs=1e-14)


def test_sink_local_spends_the_rest_of_its_budget_on_the_newest_pages():
    lengths = Filled(torch.tensor([0, 5]), torch.tensor([19, 19]), 20)
    selected = SinkLocal(PageBudget(2, 5, 1, 1)).select({}, None, None, lengths, Scoring(1.0))
    assert selected.tolist() == [[[0, 6, 7, 8, 9]], [[2, 6, 7, 8, 9]]]


def test_dense_reads_all_pages():
    lengths = Filled(torch.tensor([0, 5]), torch.tensor([7, 6]), 9)
    selected = Dense(PageBudget(2, 1, 0, 1)).select({}, None, None, lengths, Scoring(1.0))
    assert selected.tolist() == [[[0, 1, 2, 3, -1]], [[-1, -1, 2, 3, -1]]]


def test_last_row_keeps_what_was_last_read_of_a_page():
    q, k, v, mask = one_layer(tokens=8)
    policy = LastRow(PageBudget(2, 2, 0, 1), calibrate_every=2)
    scoring = Scoring(0.4)
    state = policy.init(q[:, :, -1:], k, v, mask, scoring)
    rows = max_pooled(q[:, :, -1:], k, Filled.of_mask(mask), 2, scoring, mask)[:, :, 0]
    assert torch.equal(state["probability"][0], rows[0])
    assert (state["probability"][1, :, :3] == -1).all()  # padding was never read
    # A page opens; two are read.
    lengths = Filled(torch.tensor([0, 6]), torch.tensor([8, 8]), 9)
    selected = policy.select(state, None, None, lengths, scoring)
    assert selected.shape == (2, 2, 2) and (selected[:, :, 1] == 4).all()
    assert torch.equal(selected[0, :, 0], rows[0].argmax(-1))
    read = torch.tensor([0.25, 0.75], dtype=F64).expand(2, 2, 2)
    after = policy.observe(state, selected, read, k[:, :, -1:], lengths)
    expected = torch.cat((state["probability"], torch.full((2, 2, 1), -1.0, dtype=F64)), 2)
    assert torch.equal(after["probability"], expected.scatter(2, selected, read))
    assert after[STEPS].tolist() == [1, 1]


@pytest.mark.parametrize("rows", (1, 3, 9))
def test_ema_is_the_recursion_over_the_rows_in_which_a_page_was_read(rows):
    q, k, v, mask = one_layer(tokens=11)
    policy, scoring = Ema(PageBudget(2, 2, 0, 1), alpha=0.3), Scoring(0.4)
    state = policy.init(q[:, :, 11 - rows :], k, v, mask, scoring)
    for b in range(2):
        first = int(mask[b].argmax())
        average = torch.full((2, 6), -1.0, dtype=F64)
        for now in range(11 - rows, 11):
            if now < first:
                continue
            query = q[b, :, now].unflatten(0, (2, 2))
            probs = (query @ k[b, :, first : now + 1].mT * 0.4).softmax(-1).amax(1)
            for page in range(first // 2, now // 2 + 1):
                low, high = max(2 * page - first, 0), 2 * page + 2 - first
                read = probs[:, low:high].amax(1)
                before = average[:, page]
                average[:, page] = torch.where(before < 0, read, 0.3 * read + 0.7 * before)
        assert (state["probability"][b] - average).abs().max() < 1e-14
    # One step more: an observed page, one for the first time, and those that no step read.
    state["probability"][0, :, 2] = -1
    selected = torch.tensor([[[1, 2], [2, -1]]] * 2)
    read = torch.tensor([[[0.5, 0.25], [0.125, 9.0]]] * 2, dtype=F64)
    lengths = Filled(torch.tensor([0, 6]), torch.tensor([11, 11]), 12)
    after = policy.observe(state, selected, read, k[:, :, -1:], lengths)["probability"]
    expected = state["probability"].clone()
    expected[0, 0, 1] = 0.3 * 0.5 + 0.7 * expected[0, 0, 1]
    expected[0, 0, 2], expected[0, 1, 2] = 0.25, 0.125
    expected[1, 0, 1], expected[1, 0, 2] = 0.5, 0.25  # padding in front: never read before
    expected[1, 1, 2] = 0.125
    assert (after - expected).abs().max() < 1e-15


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.sampled_from((1, 2, 5)), st.integers(1, 17))
def test_quest_bounds_hold_whenever_keys_come(seed, page, prompt):
    """The bounds are those of the definition, above every score, and by steps as at once."""
    q, k, v, mask = one_layer(seed, tokens=18, dtype=torch.float32)
    policy, scoring = Quest(PageBudget(page, 3, 0, 1)), Scoring(1.0)
    prompt = max(prompt, 8)  # the second text begins at slot 6
    state = policy.init(q[:, :, :0], k[:, :, :prompt], v[:, :, :prompt], mask[:, :prompt], scoring)
    first = torch.tensor([0, 6])
    for now in range(prompt, 18):
        lengths = Filled(first, torch.full((2,), now), now + 1)
        query = q[:, :, now : now + 1]
        selected = policy.select(state, query, None, lengths, scoring)
        bounds = torch.full((2, 2, lengths.pages(page)), float("-inf"))
        for b, g, n in torch.cartesian_prod(*map(torch.arange, bounds.shape)).tolist():
            keys = k[b, g, max(n * page, int(first[b])) : min((n + 1) * page, now)]
            if len(keys):
                least, largest = keys.amin(0), keys.amax(0)
                heads = query[b, 2 * g : 2 * g + 2, 0]
                bound = torch.maximum(heads * least, heads * largest).sum(-1)
                assert (heads @ keys.T <= bound[:, None] + 1e-5).all()
                bounds[b, g, n] = bound.max()
        assert torch.equal(selected, select_pages(bounds, policy.budget, lengths))
        state = policy.observe(state, selected, None, k[:, :, now : now + 1], lengths)
        grown = policy.init(query, k[:, :, : now + 1], v, mask[:, : now + 1], scoring)
        assert torch.equal(state["least"], grown["least"])
        assert torch.equal(state["largest"], grown["largest"])


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.sampled_from((1, 2, 5)), st.sampled_from((0.0, 0.4, 1.0)))
def test_page_range_goes_by_shares_of_estimates_between_the_bounds(seed, page, reach):
    """The pages are those of the definition, key by key, in memory that grows and in more room."""
    q, k, v, mask = one_layer(seed, tokens=18, dtype=F64)
    policy = PageRange(PageBudget(page, 4, 0, 1), reach=reach)
    scoring = Scoring(0.7, softcap=2.0)
    state = policy.init(q[:, :, :0], k[:, :, :9], v[:, :, :9], mask[:, :9], scoring)
    first = torch.tensor([0, 6])
    for now in range(9, 18):
        lengths = Filled(first, torch.full((2,), now), now + 1)
        query = q[:, :, now : now + 1]
        shares = torch.zeros(2, 2, lengths.pages(page), dtype=F64)
        for b, g, head in torch.cartesian_prod(*map(torch.arange, (2, 2, 2))).tolist():
            row = query[b, 2 * g + head, 0] * scoring.scale
            estimates = torch.full(shares.shape[2:], float("-inf"), dtype=F64)
            for n in range(len(estimates)):
                keys = k[b, g, max(n * page, int(first[b])) : min((n + 1) * page, now)]
                if len(keys):
                    ends = torch.stack((row * keys.amin(0), row * keys.amax(0)))
                    lower, upper = ends.amin(0).sum(), ends.amax(0).sum()
                    estimates[n] = (upper + lower) / 2 + reach * (upper - lower) / 2
            shares[b, g] += (2 * (estimates / 2).tanh()).softmax(-1) / 2
        expected = select_pages(shares, policy.budget, lengths)
        assert torch.equal(policy.select(state, query, None, lengths, scoring), expected)
        room = {name: torch.nn.functional.pad(x, (0, 0, 0, 3)) for name, x in state.items()}
        wide = dataclasses.replace(lengths, slots=now + 1 + 2 * page)
        assert torch.equal(policy.select(room, query, None, wide, scoring), expected)
        state = policy.observe(state, expected, None, k[:, :, now : now + 1], lengths)


def test_page_range_with_a_reach_beyond_the_bound_is_refused():
    with pytest.raises(UsageError, match="Give 0 to 1"):
        PageRange(PageBudget(4, 4, 0, 1), reach=1.5)


def test_snapkv_counts_the_votes_of_the_window_and_keeps_what_comes_later():
    q, k, v, mask = one_layer(tokens=20)
    mask[1, :17] = 0  # fewer tokens than the window has
    policy, scoring = SnapKV(PageBudget(4, 3, 1, 1), window=4, kernel=3), Scoring(0.4)
    state = policy.init(q[:, :, -4:], k, v, mask, scoring)
    assert state["kept_from"].tolist() == [16, 17]
    for b in range(2):
        first = int(mask[b].argmax())
        votes = torch.zeros(2, 22, dtype=F64)  # one more at either end
        queries = range(max(16, first), 20)
        for now in queries:
            query = q[b, :, now].unflatten(0, (2, 2))
            probs = (query @ k[b, :, first : now + 1].mT * 0.4).softmax(-1).mean(1)
            votes[:, first + 1 : now + 2] += probs / len(queries)
        smooth = (votes[:, :-2] + votes[:, 1:-1] + votes[:, 2:]) / 3
        expected = smooth.unflatten(1, (5, 4)).sum(-1)
        assert (state["votes"][b] - expected).abs().max() < 1e-15
    # Page 0 is the sink, and the last one local. Of the others the one that has the most votes is
    # read until there are pages of the window and of tokens that came later, the newest first.
    for now, taken_page in ((20, 4), (24, 5), (28, 6)):
        lengths = Filled(torch.tensor([0, 17]), torch.full((2,), now), now + 1)
        selected = policy.select(state, None, None, lengths, scoring)
        assert (selected[0] == torch.tensor([0, taken_page, now // 4])).all()
    state["kept_from"][0] = 20
    best = state["votes"][0, :, 1:4].argmax(-1) + 1
    lengths = Filled(torch.tensor([0, 17]), torch.tensor([20, 20]), 21)
    assert torch.equal(policy.select(state, None, None, lengths, scoring)[0, :, 1], best)


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("pairs", (0, 3, 4))
def test_expected_attention_is_that_of_a_gaussian_turned_to_the_positions_ahead(pairs, interleaved):
    """The paper's way, from queries without rotation and matrices of rotation, for each key."""
    plain, k, v, mask = one_layer(tokens=14)
    frequencies, scale, ahead = (1.0, 0.3, 0.05, 0.01)[:pairs], 0.35, 7

    def rotation(position):
        matrix = torch.eye(8, dtype=F64)
        for n, frequency in enumerate(frequencies):
            i, j = (2 * n, 2 * n + 1) if interleaved else (n, n + pairs)
            angle = torch.tensor(frequency * position, dtype=F64)
            matrix[i, i] = matrix[j, j] = angle.cos()
            matrix[i, j], matrix[j, i] = -angle.sin(), angle.sin()
        return matrix

    turned = torch.stack([plain[:, :, t] @ rotation(t).mT for t in range(14)], 2)
    budget = PageBudget(4, 2, 0, 1)
    policy = ExpectedAttention(budget, frequencies, interleaved, ahead, history=10)
    scoring = Scoring(scale)
    state = policy.init(turned[:, :, 3:13], k[:, :, :13], v, mask[:, :13], scoring)
    lengths = Filled.of_mask(mask[:, :13])
    mean_turn = torch.stack([rotation(13 + j) for j in range(ahead)]).mean(0)
    terms = torch.full((2, 4, 16), float("-inf"), dtype=F64)
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        first = int(lengths.first_B[b])
        tail = plain[b, h, max(first, 3) : 13]
        mean, covariance = mean_turn @ tail.mean(0), tail.T.cov(correction=0)
        covariance = mean_turn @ covariance @ mean_turn.T
        for t in range(first, 14):  # key 13 comes as a step
            key = k[b, h // 2, t]
            terms[b, h, t] = scale * mean @ key + scale**2 * key @ covariance @ key / 2
    sums = terms.exp()
    sums[..., 13] = 0
    expected = sums.unflatten(-1, (4, 4)).sum(-1).log()
    real = expected > float("-inf")
    # A few products of numbers of order one: 1e-13 is a hundred roundings.
    difference = (state["log_expected"].flatten(1, 2) - expected)[real]
    assert difference.abs().max() < 1e-13
    assert (state["log_expected"].flatten(1, 2)[~real] == float("-inf")).all()
    lengths = Filled(lengths.first_B, torch.tensor([13, 13]), 14)
    after = policy.observe(state, torch.zeros(2, 2, 1), None, k[:, :, 13:], lengths)
    share = (terms.exp() / terms.exp().sum(-1, keepdim=True)).unflatten(1, (2, 2)).mean(2)
    mass = share.unflatten(-1, (4, 4)).sum(-1)
    selected = policy.select(after, None, None, lengths, scoring)
    assert torch.equal(selected, select_pages(mass, budget, lengths))
    assert (after["log_expected"].softmax(-1).mean(2) - mass).abs().max() < 1e-13


def test_the_top_p_oracle_takes_as_few_pages_as_hold_the_share():
    q, k, _, mask = one_layer(tokens=16)
    lengths, budget = Filled.of_mask(mask), PageBudget(2, 7, 1, 1)
    for share in (0.3, 0.6, 0.9, 1.0):
        policy = OracleTopP(budget, share)
        selected = policy.select({}, q[:, :, -1:], k, lengths, Scoring(0.7))
        scores = torch.einsum("bghd,bgtd->bght", q[:, :, -1].unflatten(1, (2, 2)), k) * 0.7
        mass = scores.masked_fill(mask[:, None, None] == 0, float("-inf")).softmax(-1)
        mass = mass.unflatten(-1, (8, 2)).sum(-1).mean(2)
        assert (selected[1, :, :5] == torch.arange(3, 8)).all()  # all five pages fit
        for g in range(2):
            named = [0, 7, *sorted(range(1, 7), key=lambda n: -float(mass[0, g, n]))]
            enough = next(n for n in range(2, 9) if mass[0, g, named[:n]].sum() >= share - 1e-12)
            count = min(enough, budget.pages)
            assert sorted(named[:count]) == selected[0, g][selected[0, g] >= 0].tolist()


@pytest.mark.parametrize(
    "policy",
    (
        lambda: Ema(PageBudget(2, 2, 0, 1), alpha=0.0),
        lambda: OracleTopP(PageBudget(2, 2, 0, 1), share=1.5),
        lambda: SnapKV(PageBudget(2, 2, 0, 1), kernel=4),
        lambda: ExpectedAttention(PageBudget(2, 2, 0, 1), ahead=0),
    ),
)
def test_numbers_without_a_meaning_are_refused(policy):
    with pytest.raises(UsageError, match="Give"):
        policy()


def test_a_slice_of_the_layers_is_calibrated_at_each_step():
    policy = LastRow(PageBudget(2, 2, 0, 1), calibrate_every=3)
    due = [
        [bool(policy.due({STEPS: torch.tensor([done])}, layer)) for layer in range(3)]
        for done in range(4)
    ]
    assert due == [
        [False, False, True],
        [False, True, False],
        [True, False, False],
        [False, False, True],
    ]
    every = dataclasses.replace(policy, calibrate_every=1)
    assert every.due({STEPS: torch.tensor([0])}) and LastRow(policy.budget).due({}) is None
    with pytest.raises(UsageError, match="calibration step every 0 steps"):
        LastRow(policy.budget, calibrate_every=0)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_states_of_fixed_room_and_states_that_grow_select_the_same(data):
    """Decoding with memory of 40 slots, and with one of as many slots as there are tokens."""
    kind = data.draw(st.sampled_from(sorted(set(POLICIES) - MEASURING)))
    policy = small(kind, PageBudget(data.draw(st.sampled_from((1, 3, 4))), 4, 1, 1))
    tokens, steps, scoring = 20, 6, Scoring(0.4)
    q, k, v, mask = one_layer(data.draw(st.integers(0, 99)), tokens=tokens + steps)
    room = [torch.nn.functional.pad(x, (0, 0, 0, 40 - x.shape[2])) for x in (k, v)]
    rows = q[:, :, max(0, tokens - policy.history) : tokens]
    grows = policy.init(rows, k[:, :, :tokens], v[:, :, :tokens], mask[:, :tokens], scoring)
    masked = torch.nn.functional.pad(mask[:, :tokens], (0, 40 - tokens))
    fixed = policy.init(rows, *room, masked, scoring)
    for now in range(tokens, tokens + steps):
        first, last = Filled.of_mask(mask).first_B, torch.full((2,), now)
        present, whole = Filled(first, last, now + 1), Filled(first, last, 40)
        query, new = q[:, :, now : now + 1], k[:, :, now : now + 1]
        selected = policy.select(grows, query, k[:, :, : now + 1], present, scoring)
        again = policy.select(fixed, query, room[0], whole, scoring)
        if kind == "dense":
            again = again[..., : selected.shape[-1]]
        assert torch.equal(selected, again)
        draw = torch.Generator().manual_seed(now)
        probs = torch.rand(2, 2, selected.shape[-1], generator=draw, dtype=F64)
        named = selected.expand(2, 2, -1)
        grows = policy.observe(grows, named, probs, new, present)
        fixed = policy.observe(fixed, named, probs, new, whole)


@pytest.mark.parametrize("kind", POLICIES)
def test_a_row_that_is_padding_at_first_reads_its_own_pages(kind):
    """A text of few tokens beside a long one, whose prompt is read in parts."""
    policy, scoring, page = small(kind, PageBudget(2, 3, 1, 1)), Scoring(0.4), 2
    q, k, v, _ = one_layer(tokens=14)
    mask = torch.ones(2, 14, dtype=torch.int64)
    mask[1, :7] = 0
    state = policy.init(q[:, :, max(0, 4 - policy.history) : 4], *(x[:, :, :4] for x in (k, v)),
                        mask[:, :4], scoring)  # fmt: skip
    for now in range(4, 14):
        keys, lengths = k[:, :, : now + 1], Filled.of_mask(mask[:, : now + 1])
        selected = policy.select(state, q[:, :, now : now + 1], keys, lengths, scoring)
        wanted = {*range(7 // page, now // page + 1)} if now >= 7 else set()
        read = set(selected[1].flatten().tolist()) - {-1}
        assert read <= wanted and (not wanted or {7 // page, now // page} <= read)
        named = selected.expand(2, 2, -1)
        probabilities = torch.full(named.shape, 0.5, dtype=F64)
        new = k[:, :, now : now + 1]
        state = policy.observe(state, named, probabilities, new, lengths)
    assert not any(bool(x.isnan().any()) for x in state.values())


@pytest.mark.parametrize("kind", POLICIES)
def test_states_are_of_the_types_that_are_declared(kind):
    policy = small(kind, PageBudget(4, 4, 1, 1))
    q, k, v, mask = one_layer(dtype=torch.float32)
    state = policy.init(q[:, :, max(0, 23 - policy.history) :], k, v, mask, Scoring(0.4))
    heads = KVHeads(2, 4, 8, 8, torch.float32)
    declared = policy.state_types(heads, 6, 2)
    assert {name: (tuple(x.shape), x.dtype) for name, x in state.items()} == declared


@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_is_saved_as_plain_values(kind):
    policy = POLICIES[kind](PageBudget(16, 64, 4, 4))
    assert policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == policy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "quests"}, "Unknown KV policy 'quests'"),
        ({"budgets": 3}, "Unknown field of the KV policy last-row 'budgets'"),
        ({"page": "16"}, "'16' is no page of the KV policy last-row"),
        ({"page": True}, "True is no page"),
        ({"page": None}, "None is no page"),
        ({"local": 80}, "below sink plus local"),
        ({"calibrate_every": 0}, "every 0 steps"),
    ],
)
def test_plain_values_of_no_policy_are_refused(change, words):
    values = policy_to_dict(LastRow(PageBudget(16, 64, 4, 4)))
    with pytest.raises(UsageError, match=words):
        policy_from_dict(values | change)
    with pytest.raises(UsageError, match="lacks sink"):
        policy_from_dict({name: value for name, value in values.items() if name != "sink"})
