"""ONNX graphs whose steps read the pages that policies select: the interpreter's tokens."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from programs import tiny_program

import graphopt as go
from graphopt.backends.onnx_cache import RoomyCache
from graphopt.backends.opening import open_language_model
from graphopt.errors import LoweringError, SourceError, UsageError
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.ir import Program
from graphopt.ir.attach_policy import with_policies
from graphopt.ir.kv_policies import policy_from_dict
from graphopt.ir.kv_policies.attention_cnn import new_weights
from graphopt.lowering.onnx.genai import why_not

BUDGET = {"page": 4, "pages": 3, "sink": 1, "local": 1}
TURNED = {"frequencies": (1.0, 0.3, 0.05), "ahead": 9, "history": 12}
POLICIES = [
    ("dense", {}), ("sink-local", {}), ("quest", {}), ("page-range", {}),
    ("key-codes", {"queries": 5}),
    ("last-row", {"calibrate_every": 3}),
    ("ema", {}), ("ema", {"calibrate_every": 2}), ("snapkv", {"window": 5}),
    ("expected-attention", TURNED), ("expected-attention", {**TURNED, "interleaved": True}),
    ("predictor", {}), ("predictor", {"channels": 1, "history": 9, "calibrate_every": None}),
]  # fmt: skip


def attached(kind: str, pages: int = 3, fields: Any = None, **options: Any) -> Program:
    """Return a program of three layers, the first of which reads all keys."""
    program = tiny_program(cache=True, layers=3, **options)
    policy = policy_from_dict({"kind": kind, **BUDGET, "pages": pages, **(fields or {})})
    weights = new_weights(policy.channels, seed=1) if kind == "predictor" else None
    return with_policies(program, dict.fromkeys([*program.states][1:], policy), weights)


def opened(program: Program, folder: Any, **options: Any) -> Any:
    go.emit(program, folder, emit=("onnx",), dtype="float32", **options)
    return open_language_model(str(folder), "onnx")


def check(program: Program, model: Any, cuts: list[int], padding: int) -> None:
    """Compare logits, and what policies remember, of steps that end at the cuts."""
    ids = torch.randint(0, 97, (2, cuts[-1]), generator=torch.Generator().manual_seed(5))
    seen = torch.ones_like(ids)
    seen[1, :padding] = 0
    runner, past, cache = Runner(program), None, model.start(2)
    for start, stop in itertools.pairwise(cuts):
        step = {"input_ids": ids[:, start:stop], "attention_mask": seen[:, :stop]}
        step["position_ids"] = (seen[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:]
        (wanted,), past = runner.run(step, past)
        found, cache = model.step(step, cache)
        real = seen[:, start:stop].bool()
        # Some hundred roundings in fp32 of logits of order 1.
        torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=2e-5)
    for number, state in enumerate(program.states.values()):
        if state.policy is None:
            continue
        for name, theirs in zip(state.policy_types, past[state.name].state, strict=True):
            mine = torch.from_numpy(cache.buffers[f"past_policy.{number}.{name}"])
            # What lies in room that no token has reached counts for nothing.
            mine = mine[tuple(slice(size) for size in theirs.shape)]
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


CASES = [(kind, fields, False) for kind, fields in POLICIES] + [
    (kind, {}, True) for kind in ("quest", "key-codes", "snapkv", "predictor")
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields", "policy_op"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_logits_and_states_are_the_interpreters(kind, fields, policy_op, tmp_path):
    """Prompts around edges of pages, padded rows, several tokens on a past, and single ones."""
    program = attached(kind, fields=fields, sinks=policy_op, softcap=2.0 if policy_op else None)
    model = opened(program, tmp_path / "out", onnx_policy_op=policy_op)
    check(program, model, [0, 16, *range(17, 30), 33, *range(34, 41)], padding=6)
    check(program, model, [0, 19, *range(20, 27)], padding=6)
    check(program, model, [*range(22)], padding=0)  # a text that begins with one token


def test_sinks_and_caps_in_the_graph_itself(tmp_path):
    program = attached("last-row", sinks=True, softcap=2.0)
    check(program, opened(program, tmp_path / "out"), [0, 16, *range(17, 30)], padding=6)


def test_the_operator_has_a_body_that_any_runtime_runs(tmp_path):
    """One function for all layers of a kind, its nodes standard operators; a layer has a number."""
    program = attached("ema", fields={"calibrate_every": 3})
    opened(program, tmp_path / "out", onnx_policy_op=True)
    model = onnx.load(tmp_path / "out" / "onnx" / "model.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "EmaAttention"]
    assert [node.domain for node in nodes] == ["graphopt"] * 2
    assert [node.attribute[0].i for node in nodes] == [1, 2]
    (body,) = [each for each in model.functions if each.name == "EmaAttention"]
    domains = {node.domain for node in _within(body.node)}
    assert domains == {""}
    onnx.checker.check_model(str(tmp_path / "out" / "onnx" / "model.onnx"))


def _within(nodes: Any) -> Any:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _within(attribute.g.node)


def test_policies_that_differ_are_operators_of_their_own(tmp_path):
    program = tiny_program(cache=True, layers=3)
    policies = {
        name: policy_from_dict({"kind": "ema", **BUDGET, "alpha": alpha})
        for name, alpha in zip(program.states, (0.2, 0.5, 0.5), strict=True)
    }
    program = with_policies(program, policies)
    model = opened(program, tmp_path / "out", onnx_policy_op=True)
    graph = onnx.load(tmp_path / "out" / "onnx" / "model.onnx", load_external_data=False)
    names = [node.op_type for node in graph.graph.node if node.domain == "graphopt"]
    assert names == ["EmaAttention", "EmaAttention2", "EmaAttention2"]
    check(program, model, [0, 17, *range(18, 30)], padding=0)


@pytest.mark.slow
def test_pages_of_several_sizes(tmp_path):
    program = tiny_program(cache=True, layers=3)
    one, other = (policy_from_dict({"kind": "quest", **BUDGET, "page": page}) for page in (4, 3))
    program = with_policies(program, dict(zip(program.states, (one, other, one), strict=True)))
    model = opened(program, tmp_path / "out")
    assert model.start_text(13).room == 24
    check(program, model, [0, 17, *range(18, 40)], padding=3)


@pytest.mark.parametrize("kind", ["quest", "sink-local"])
def test_a_budget_of_everything_is_the_plain_graph(kind, tmp_path):
    ids = torch.randint(0, 97, (1, 26), generator=torch.Generator().manual_seed(6))
    models = [
        opened(program, tmp_path / name)
        for name, program in (
            ("policy", attached(kind, pages=7)),
            ("plain", tiny_program(cache=True, layers=3)),
        )
    ]
    caches = [model.start(1) for model in models]
    for start, stop in itertools.pairwise([0, 9, *range(10, 27)]):
        step = {
            "input_ids": ids[:, start:stop],
            "attention_mask": torch.ones(1, stop, dtype=torch.long),
            "position_ids": torch.arange(start, stop)[None],
        }
        (one, caches[0]), (other, caches[1]) = (
            model.step(step, cache) for model, cache in zip(models, caches, strict=True)
        )
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_a_step_writes_where_keys_lie(tmp_path):
    """Buffers with room stay where they are; what lies behind the last key is not read."""
    program = attached("quest")
    model = opened(program, tmp_path / "out")
    ids = torch.randint(0, 97, (1, 24), generator=torch.Generator().manual_seed(7))

    def run(cache: RoomyCache) -> list[torch.Tensor]:
        made = []
        for start, stop in itertools.pairwise([0, 17, *range(18, 25)]):
            step = {
                "input_ids": ids[:, start:stop],
                "attention_mask": torch.ones(1, stop, dtype=torch.long),
                "position_ids": torch.arange(start, stop)[None],
            }
            logits, after = model.step(step, cache)
            assert after is cache
            made.append(logits)
        return made

    cache = model.start_text(40)
    places = {name: x.ctypes.data for name, x in cache.buffers.items()}
    for x in cache.buffers.values():
        x[...] = 7  # what another text may have left
    roomy = run(cache)
    assert {name: x.ctypes.data for name, x in cache.buffers.items()} == places
    grown = model.start(1)
    for one, other in zip(roomy, run(grown), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    assert grown.room == 28  # room for 20 was filled, and a quarter more is made


def test_a_text_longer_than_its_cache_is_refused(tmp_path, monkeypatch):
    """By the graph itself, whoever runs it: nothing is written beyond a buffer."""
    model = opened(attached("quest"), tmp_path / "out")
    cache = model.start_text(16)
    assert cache.room == 16
    monkeypatch.setattr(cache, "hold", lambda tokens: None)
    with pytest.raises(SourceError, match="ONNX Runtime cannot run"):
        model.step(complete_inputs({"input_ids": torch.ones(1, 17, dtype=torch.long)}), cache)
    for name, x in cache.buffers.items():
        if name.startswith("past_key_values"):  # room that is no multiple of the page
            cache.buffers[name] = np.zeros((*x.shape[:2], 18, x.shape[3]), x.dtype)
    with pytest.raises(SourceError, match="ONNX Runtime cannot run"):
        model.step(complete_inputs({"input_ids": torch.ones(1, 9, dtype=torch.long)}), cache)


def test_what_graphs_do_not_have_is_refused(tmp_path):
    with pytest.raises(LoweringError, match="oracle reads all keys to select some"):
        go.emit(attached("oracle"), tmp_path / "out", emit=("onnx",))
    with pytest.raises(UsageError, match="--onnx-policy-op is for the ONNX form"):
        go.emit(attached("quest"), tmp_path / "out", emit=("torch",), onnx_policy_op=True)
    assert why_not(attached("quest")) == "it hands on no state of a policy beside keys and values"


def test_a_graph_of_other_caches_is_refused(tmp_path):
    opened(attached("ema"), tmp_path / "out")
    path = tmp_path / "out" / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    (state,) = [x for x in model.graph.input if x.name == "past_policy.1.probability"]
    state.type.tensor_type.shape.dim[2].dim_param = "pages_of_none"
    onnx.save(model, path)
    with pytest.raises(SourceError, match=r"'past_policy\.1\.probability' is a tensor\(float\)"):
        open_language_model(str(tmp_path / "out"), "onnx")
