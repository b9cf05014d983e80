"""Programs whose KV states have policies: what they compute, print, save and load."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from programs import tiny_program
from safetensors.torch import load_file, save_file
from sampling import slow_but

from graphopt.errors import ParseError, SourceError, UsageError, VerifyError
from graphopt.execute.interpreter import Runner
from graphopt.execute.saved_cache import cache_of_tensors, cache_tensors
from graphopt.ir.attach_policy import with_policies
from graphopt.ir.kv import KVLayout
from graphopt.ir.kv_memory import PolicyKV
from graphopt.ir.kv_policies import LastRow, OracleTopK, PageBudget, SinkLocal
from graphopt.ir.parse import parse_program
from graphopt.ir.relayout import with_layouts
from graphopt.ir.serialize import program_from_json, program_to_json
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import B, P, S
from graphopt.ir.verify import verify

PAGE = 4
SMALL = PageBudget(page=PAGE, pages=3, sink=1, local=1)
POLICIES = [SinkLocal, LastRow, OracleTopK]


@pytest.fixture(scope="module")
def plain():
    return tiny_program(cache=True, softcap=2.0, sinks=True)


def attached(program, policy):
    return with_policies(program, dict.fromkeys(program.states, policy))


def run(program, ids, cuts, mask=None, mode="torch", dtype=torch.float64, past=None):
    """Return the logits of steps that end at `cuts`, and the cache behind them."""
    runner = Runner(program, dtype=dtype, mode=mode)
    mask = torch.ones_like(ids) if mask is None else mask
    outputs = []
    start = 0 if past is None else next(iter(past.values())).kv[0].shape[2]
    for stop in cuts:
        batch = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        (logits,), past = runner.run(batch, past)
        outputs.append(logits)
        start = stop
    return torch.cat(outputs, 1), past


def tokens(length, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (rows, length), generator=generator)


@pytest.mark.parametrize("make", POLICIES)
@pytest.mark.parametrize("mode", slow_but(["torch", "reference"], "torch"))
def test_a_budget_of_everything_reads_everything(plain, make, mode):
    """For lengths around the edges of pages, prompts from one token on, and padded rows."""
    length = 4 * PAGE + 2
    budget = PageBudget(PAGE, -(-length // PAGE), 1, 1)
    ids = tokens(length, rows=3)
    mask = torch.ones_like(ids)
    mask[1, :PAGE] = 0
    mask[2, :3] = 0
    for prompt in (PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1):
        cuts = [prompt, *range(prompt + 1, length + 1)]
        dense, _ = run(plain, ids, cuts, mask)
        sparse, _ = run(attached(plain, make(budget)), ids, cuts, mask, mode)
        real = mask.bool()
        # A dozen roundings of sums of some hundred terms, logits of order 1.
        torch.testing.assert_close(sparse[real], dense[real], rtol=0, atol=1e-12)
    cuts = [*range(1, length + 1)]
    dense, _ = run(plain, ids, cuts)
    sparse, _ = run(attached(plain, make(budget)), ids, cuts, mode=mode)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", POLICIES)
def test_the_fast_form_is_the_reference(plain, make):
    program = attached(plain, make(SMALL))
    ids, cuts = tokens(30), [9, 12, *range(13, 31)]
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    fast, left = run(program, ids, cuts, mask)
    slow, kept = run(program, ids, cuts, mask, "reference")
    dense, _ = run(plain, ids, cuts, mask)
    real = mask.bool()
    torch.testing.assert_close(fast[real], slow[real], rtol=0, atol=1e-12)
    assert float((fast - dense)[real].abs().max()) > 1e-3  # it does leave pages out
    for name in left:
        for mine, theirs in zip(left[name].state, kept[name].state, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_what_is_not_selected_is_not_read(plain):
    """Keys and values of pages that sink and local leave out may be anything."""
    program = attached(plain, SinkLocal(SMALL))
    ids = tokens(25)
    _, past = run(program, ids, [24])
    pages = 7  # of 25 tokens
    spoiled = {}
    for name, held in past.items():
        k, v = (x.clone() for x in held.kv)
        left_out = slice(PAGE, (pages - SMALL.pages + 1) * PAGE)
        k[:, :, left_out], v[:, :, left_out] = float("nan"), 1e9
        spoiled[name] = PolicyKV((k, v), held.state)
    expected, _ = run(program, ids, [25], past=past)
    found, _ = run(program, ids, [25], past=spoiled)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_several_tokens_on_a_past_are_dense_and_begin_anew(plain):
    program = attached(plain, LastRow(SMALL))
    ids = tokens(30)
    whole, fresh = run(program, ids, [30])
    torch.testing.assert_close(whole, run(plain, ids, [30])[0], rtol=0, atol=0)
    in_two, left = run(program, ids, [12, 30])
    torch.testing.assert_close(in_two, whole, rtol=0, atol=1e-12)
    for name in fresh:
        for mine, theirs in zip(left[name].state, fresh[name].state, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    _, past = run(program, ids, [20, 21, 22])
    assert past["kv.0"].state[1].tolist() == [2, 2]  # steps since the last that was dense
    _, past = run(program, ids, [30], past=past)
    assert past["kv.0"].state[1].tolist() == [0, 0]


def test_layers_take_turns_in_dense_steps(plain):
    """Layer i is dense at step t where t + i is a multiple of `calibrate_every`."""
    program = attached(plain, LastRow(SMALL, calibrate_every=2))
    assert [call.attrs.get("layer") for call in program.calls] == [None, 0, 1, None]
    ids = tokens(40)
    _, past = run(program, ids, [33])
    for step in range(1, 4):
        before = past
        _, past = run(program, ids, [33 + step], past=past)
        for layer, name in enumerate(program.states):
            # What a step reads gets a probability of this step's.
            read = past[name].state[0] != before[name].state[0]
            pages = 9 if (step + layer) % 2 == 0 else SMALL.pages
            assert read.sum(-1).unique().tolist() == [pages]


def test_types_of_states(plain):
    program = attached(plain, LastRow(SMALL))
    types, _ = infer_program(program)
    (node,) = [n for n in program.functions["block_last_row"].nodes if n.op == "policy_attention"]
    _, present_k, _, probability, steps = (types[1][value] for value in node.outputs)
    assert present_k.shape == (B, 2, P + S, 8)
    assert probability.concrete({B: 3, P: 7, S: 2}) == (3, 2, 3) and steps.shape == (B,)
    _, past = run(program, tokens(9, rows=3), [7, 8, 9])
    for state, tensor in zip(program.states["kv.0"].policy_types.values(), past["kv.0"].state,
                             strict=True):  # fmt: skip
        assert tuple(tensor.shape) == state.concrete({B: 3, P: 9, S: 1})


def test_text_before_and_after(plain):
    before = str(plain)
    after = str(attached(plain, LastRow(SMALL)))
    policy = 'policy("last-row", page=4, pages=3, sink=1, local=1, calibrate_every=None)'
    names = "probability", "steps"
    expected = before
    for old, new in (
        ("block(", "block_last_row("),
        ("; kv: past_k, past_v -> present_k, present_v)", "; kv: past_k, past_v, "
         + ", ".join(f"past_{n}" for n in names) + " -> present_k, present_v, "
         + ", ".join(f"present_{n}" for n in names) + ")"),
        ("a, present_k, present_v = attention(",
         "a, present_k, present_v, present_probability, present_steps = policy_attention("),
        ("past_v=past_v, scale=0.3535533905932738, causal, softcap=2.0)",
         "past_v=past_v, state_0=past_probability, state_1=past_steps, scale=0.3535533905932738, "
         f"causal, softcap=2.0, policy={policy})"),
        ("contiguous", f"contiguous {policy} query_heads=4"),
    ):  # fmt: skip
        assert old in expected
        expected = expected.replace(old, new)

    def without_comments(text):
        return [line.split(" #")[0].rstrip() for line in text.splitlines()]

    assert without_comments(after) == without_comments(expected)


@pytest.mark.parametrize("make", POLICIES)
def test_text_and_json_say_all(plain, make):
    program = with_policies(plain, {"kv.1": make(SMALL)})
    text = str(program)
    again = parse_program(text)
    verify(again)
    assert str(again) == text
    data = json.loads(json.dumps(program_to_json(program)))
    loaded = program_from_json(data, {w.name: w.producer for w in program.weights})
    verify(loaded)
    assert str(loaded) == text and loaded.states["kv.1"].policy == make(SMALL)


def test_texts_that_say_no_policy(plain):
    text = str(attached(plain, SinkLocal(SMALL)))
    for old, new, said in (
        ("pages=3, sink=1", "pages=1, sink=1", "below sink plus local"),
        ('"sink-local"', '"sink-locl"', "Unknown KV policy"),
        ("page=4", 'page="4"', "is no page"),
    ):
        with pytest.raises(ParseError, match=said):
            parse_program(text.replace(old, new))


def test_a_saved_program_with_a_wrong_policy(plain):
    data = program_to_json(attached(plain, SinkLocal(SMALL)))
    data["states"][0]["policy"]["pages"] = 1
    with pytest.raises(SourceError, match=r"malformed: state 'kv\.0': .* below sink plus local"):
        program_from_json(data, {})


def test_a_text_goes_on_from_a_saved_cache(plain, tmp_path):
    """In the middle of a page, and where the states have several layouts."""
    program = attached(plain, LastRow(SMALL, calibrate_every=3))
    program = with_layouts(program, {"kv.0": KVLayout("paged", PAGE)})
    ids, cuts = tokens(33), [17, *range(18, 34)]
    expected, _ = run(program, ids, cuts)
    _, past = run(program, ids, cuts[:7])
    save_file(cache_tensors(program, past), tmp_path / "cache.safetensors")
    again = cache_of_tensors(program, load_file(tmp_path / "cache.safetensors"))
    assert again["kv.0"].kv.length == 23
    found, _ = run(program, ids, cuts[7:], past={n: again[n] for n in reversed(again)})
    torch.testing.assert_close(found, expected[:, 23:], rtol=0, atol=0)
    tensors = load_file(tmp_path / "cache.safetensors")
    tensors["kv.1.steps"] = tensors["kv.1.steps"][:1]
    with pytest.raises(SourceError, match=r"kv\.1\.steps of the saved cache is \[1\]"):
        cache_of_tensors(program, tensors)
    del tensors["kv.0.probability"]
    with pytest.raises(SourceError, match=r"no kv\.0\.probability"):
        cache_of_tensors(program, tensors)


@pytest.mark.parametrize("page", [2, 4, 8])
def test_pages_of_a_pool(plain, page):
    budget = PageBudget(page, 3, 1, 1)
    program = attached(plain, LastRow(budget))
    paged = with_layouts(program, dict.fromkeys(program.states, KVLayout("paged", page)))
    ids, cuts = tokens(20), [9, *range(10, 21)]
    torch.testing.assert_close(run(paged, ids, cuts)[0], run(program, ids, cuts)[0], rtol=0, atol=0)


def test_where_a_policy_has_no_meaning():
    policy = SinkLocal(SMALL)
    for options, said in (
        ({"alibi": True}, "slopes"),
        ({"window": 5}, "window of 5 tokens"),
    ):
        program = tiny_program(cache=True, **options)
        with pytest.raises(UsageError, match=said):
            attached(program, policy)
    program = tiny_program(cache=True)
    with pytest.raises(UsageError, match=r"no state 'kv\.7'"):
        with_policies(program, {"kv.7": policy})
    paged = with_layouts(program, {"kv.0": KVLayout("paged", 8)})
    with pytest.raises(UsageError, match="pages of 8 tokens, and the policy selects pages of 4"):
        attached(paged, policy)
    with pytest.raises(UsageError, match="has the policy sink-local already"):
        attached(attached(program, policy), policy)
    with pytest.raises(VerifyError, match="pages of 4 tokens"):
        with_layouts(attached(program, policy), {"kv.0": KVLayout("paged", 8)})


def test_state_and_attention_have_one_policy(plain):
    program = attached(plain, SinkLocal(SMALL))
    program.states["kv.0"].policy = SinkLocal(replace(SMALL, pages=4))
    with pytest.raises(VerifyError, match=r'has policy\("sink-local", .*pages=4'):
        verify(program)


def test_layers_without_a_policy_share_their_function():
    program = with_policies(
        tiny_program(cache=True, layers=4),
        {"kv.2": SinkLocal(SMALL), "kv.3": SinkLocal(SMALL)},
    )
    assert [call.function for call in program.calls] == [
        "embed", "block", "block", "block_sink_local", "block_sink_local", "head",
    ]  # fmt: skip
