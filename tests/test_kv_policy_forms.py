"""One policy in every form of a real model: behind a long prompt all give the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.capture import capture
from graphopt.evaluate.perplexity import read_text
from graphopt.execute.language_model import load_tokenizer
from graphopt.generate import generate_ids
from graphopt.ir.attach_policy import with_policies
from graphopt.ir.kv_policies import PageBudget, policy_from_dict
from graphopt.ir.kv_policies.attention_cnn import new_weights
from graphopt.ir.policy_fitting import fitted_policy
from graphopt.pass_manager.contract import Context
from graphopt.passes.insert_kv_cache import InsertKVCache

pytestmark = [pytest.mark.network, pytest.mark.exhaustive]

PROMPT, NEW = 700, 16
BUDGET = {"page": 16, "pages": 12, "sink": 2, "local": 2}
"""192 tokens of 700."""


@pytest.fixture(scope="module")
def checkpoint(demo: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo as a transformers checkpoint."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    go.emit(capture(demo), folder, emit=("hf",), dtype="float32")
    return folder / "hf"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("sink-local", {}), ("quest", {}), ("page-range", {}), ("last-row", {"calibrate_every": 5}),
        ("ema", {"calibrate_every": 5}), ("key-codes", {}), ("snapkv", {}),
        ("expected-attention", {}), ("predictor", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_every_form_gives_the_same_tokens(
    kind: str, fields: dict[str, Any], checkpoint: Path, test_text: Path, tmp_path: Path
) -> None:
    program = InsertKVCache().run(capture(str(checkpoint)), Context()).program
    policy = policy_from_dict({"kind": kind, **BUDGET, **fields})
    assert policy.budget == PageBudget.of(16, 192, 32, 32)
    weights = new_weights(2, seed=1) if kind == "predictor" else None
    if kind == "expected-attention":
        places = [
            (call, cache.present_k.node)
            for call in program.calls
            for cache in program.function_of(call).caches
            if cache.present_k.node is not None
        ]
        policy = fitted_policy(program, policy, places)
    attached = with_policies(program, dict.fromkeys(program.states, policy), weights)
    go.emit(attached, tmp_path / "out", emit=("torch", "onnx"), dtype="float32")
    go.emit(attached, tmp_path / "op", emit=("onnx",), dtype="float32", onnx_policy_op=True)

    models = {
        "program": open_language_model(str(tmp_path / "out"), "program"),
        "torch": open_language_model(str(tmp_path / "out"), "torch"),
        "onnx": open_language_model(str(tmp_path / "out"), "onnx"),
        "operator": open_language_model(str(tmp_path / "op"), "onnx"),
    }
    tokenizer = load_tokenizer(models["program"])
    prompt = tokenizer.encode(read_text(test_text)[: 8 * PROMPT])[:PROMPT]
    assert len(prompt) == PROMPT
    found = {
        name: list(generate_ids(model, prompt, stop=set(), max_new_tokens=NEW))
        for name, model in models.items()
    }
    if weights is not None:
        policy = policy.with_weights(weights)
    found["transformers"] = by_transformers(checkpoint, prompt, policy)
    assert all(tokens == found["program"] for tokens in found.values()), found


def by_transformers(checkpoint: Path, prompt: list[int], policy: Any) -> list[int]:
    """Return what transformers' own `generate` gives with the policy."""
    from transformers import AutoModelForCausalLM

    from graphopt.integrations.transformers_generate import POLICY_ATTENTION, PolicyCache

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.set_attn_implementation(POLICY_ATTENTION)
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
        past_key_values=PolicyCache(model.config, policy), eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return made[0, len(prompt) :].tolist()
