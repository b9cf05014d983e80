"""KV policies in transformers' own `generate`, beside steps of a program by the interpreter."""

from __future__ import annotations

import pytest
import torch
from families import captured, random_model

from graphopt.errors import UsageError
from graphopt.execute.interpreter import Runner
from graphopt.integrations.transformers_generate import POLICY_ATTENTION, PolicyCache
from graphopt.ir.attach_policy import reason_against, with_policies
from graphopt.ir.kv_policies import Dense, Ema, LastRow, OracleTopK, PageBudget, Quest, SinkLocal
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_kv_cache import InsertKVCache

SMALL = PageBudget(4, pages=4, sink=1, local=2)
NEW = 20
PROMPT = torch.randint(5, 120, (2, 23), generator=torch.Generator().manual_seed(8))


def interpreted(family, policy, dense_layers=0, dtype=torch.float64):
    """Return the tokens that greedy decoding by a program with the policy gives."""
    _, program = captured(family)
    cached = InsertKVCache().run(program, Context()).program
    places = [
        (call.caches[cache.slot], reason_against(cached, call, cache, policy))
        for call in cached.calls
        for cache in cached.function_of(call).caches
    ]
    names = [name for name, reason in places[dense_layers:] if reason is None]
    assert names
    runner = Runner(with_policies(cached, dict.fromkeys(names, policy)), dtype)
    ids, cache, tokens = PROMPT, None, []
    for _ in range(NEW):
        (logits, *_), cache = runner.run({"input_ids": ids}, cache)
        ids = logits[:, -1:].argmax(-1)
        tokens.append(ids)
    return torch.cat(tokens, 1)


def generated(family, policy, dense_layers=0, dtype=torch.float64):
    model = random_model(family).to(dtype)
    model.set_attn_implementation(POLICY_ATTENTION)
    cache = PolicyCache(model.config, policy, dense_layers=dense_layers)
    found = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), past_key_values=cache, do_sample=False,
        max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return found[:, PROMPT.shape[1] :], cache


@pytest.mark.parametrize(
    "policy",
    [
        LastRow(SMALL, calibrate_every=3),
        *(
            pytest.param(policy, marks=pytest.mark.slow)
            for policy in (SinkLocal(SMALL), Ema(SMALL), Quest(SMALL), OracleTopK(SMALL))
        ),
    ],
    ids=lambda policy: policy.kind,
)
def test_generate_gives_the_tokens_that_a_program_gives(policy):
    found, cache = generated("llama", policy)
    assert torch.equal(found, interpreted("llama", policy))
    assert sorted(cache.states) == [0, 1, 2, 3]


@pytest.mark.slow
def test_policies_give_other_tokens_than_all_keys():
    """So that equal tokens say something."""
    everything, _ = generated("llama", Dense(SMALL))
    assert not torch.equal(generated("llama", SinkLocal(SMALL))[0], everything)
    whole = LastRow(PageBudget(4, pages=16, sink=0, local=1))
    assert torch.equal(generated("llama", whole)[0], everything)
    model = random_model("llama").double()
    plain = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_new_tokens=NEW,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(plain[:, PROMPT.shape[1] :], everything)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("gemma2", torch.float64), ("gpt_oss", torch.float32)],  # products of experts take no fp64
)
def test_so_it_is_with_windows_caps_and_sinks(family, dtype):
    policy = LastRow(SMALL)
    found, cache = generated(family, policy, dtype=dtype)
    assert torch.equal(found, interpreted(family, policy, dtype=dtype))
    assert len(cache.states) == 2  # every second layer has a window, and reads what it always reads


def test_dense_layers_have_no_policy():
    found, cache = generated("llama", LastRow(SMALL), dense_layers=2)
    assert sorted(cache.states) == [2, 3]
    assert torch.equal(found, interpreted("llama", LastRow(SMALL), dense_layers=2))


@pytest.mark.slow
def test_rows_of_a_padded_batch_are_as_they_are_alone():
    model = random_model("llama").double()
    model.set_attn_implementation(POLICY_ATTENTION)
    policy, page = LastRow(SMALL), SMALL.page
    padded, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    padded[0, :page], mask[0, :page] = 0, 0  # whole pages, so that the others have the same keys

    def tokens(ids, mask):
        found = model.generate(
            ids, attention_mask=mask, past_key_values=PolicyCache(model.config, policy),
            do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return found[:, ids.shape[1] :]

    together = tokens(padded, mask)
    assert torch.equal(together[1:], tokens(padded[1:], mask[1:]))
    assert torch.equal(together[:1], tokens(padded[:1, page:], mask[:1, page:]))


@pytest.mark.slow
def test_beams_take_what_the_policy_remembers_along():
    """With a budget of everything, beams are those of the model as it is."""
    model = random_model("llama").double()
    options = {
        "attention_mask": torch.ones_like(PROMPT), "do_sample": False, "num_beams": 3,
        "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    plain = model.generate(PROMPT, **options)
    model.set_attn_implementation(POLICY_ATTENTION)
    cache = PolicyCache(model.config, LastRow(PageBudget(4, pages=16, sink=0, local=1)))
    assert torch.equal(model.generate(PROMPT, past_key_values=cache, **options), plain)
    assert all(len(x) == 6 for state in cache.states.values() for x in state.values())


def test_what_a_policy_cannot_do_is_refused():
    model = random_model("llama")
    model.set_attn_implementation(POLICY_ATTENTION)
    with pytest.raises(UsageError, match="keys of no such cache"):
        model(PROMPT)
    cache = PolicyCache(model.config, LastRow(SMALL))
    model(PROMPT, past_key_values=cache)
    with pytest.raises(UsageError, match="cannot be cropped"):
        cache.crop(4)
    cache.reset()
    assert not cache.states
