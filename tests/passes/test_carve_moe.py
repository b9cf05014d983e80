"""Feed-forward parts carved into experts: figures, exactness, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from families import cases, random_model
from programs import tiny_program
from trained import LENGTH, book, save_trained

import graphopt as go
from graphopt.capture import capture
from graphopt.errors import PassError
from graphopt.ir.blocks import find_blocks
from graphopt.ir.execute import Runner
from graphopt.passes.base import Context, make_pass

TEXT = book()[:24000]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return go.capture(str(save_trained(tmp_path_factory.mktemp("trained"), layers=4)))


def carved(dense, tmp_path, options):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    recipe = f"carve-moe{{{options},seqlen={LENGTH},windows=24}}"
    program, report = go.Pipeline.parse(recipe).run(dense, calib=text)
    json.dumps(report.to_json(), allow_nan=False)
    return program, report.passes[0]


def mean(entry, key):
    parts = entry.details["parts"]
    return sum(part[key] for part in parts) / len(parts)


def test_a_fitted_router_beats_every_tokens_same_neurons_and_the_published_one(dense, tmp_path):
    _, fitted = carved(dense, tmp_path, "shared=2,active=2,experts=8")
    _, published = carved(dense, tmp_path, "shared=2,active=2,experts=8,mode=faithful")
    assert fitted.verification == "measured" and fitted.changed == 4
    assert mean(fitted, "oracle") <= mean(fitted, "routed") < mean(fitted, "random")
    assert mean(fitted, "routed") < mean(fitted, "static")
    assert mean(fitted, "routed") < mean(published, "routed")
    for part in fitted.details["parts"]:
        # Every token runs two of six.
        assert sum(part["load"]) == pytest.approx(2.0) and len(part["load"]) == 6


@pytest.mark.parametrize("mode", ["fit", "faithful"])
@pytest.mark.parametrize("shared", [0, 3])
def test_all_experts_active_is_the_model_itself(dense, tmp_path, mode, shared):
    options = f"shared={shared},active={8 - shared},experts=8,mode={mode}"
    program, _ = carved(dense, tmp_path, options)
    ids = {"input_ids": torch.arange(40).view(2, 20)}
    expected, found = Runner(dense).logits(ids), Runner(program).logits(ids)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    # A permutation: nothing is lost, and nothing is there twice.
    for block, own in zip(find_blocks(program), find_blocks(dense), strict=True):
        call, whole = program.calls[block.position], dense.calls[own.position]
        rows = [program.weights[name].load() for slot, name in call.weights.items()
                if "up_proj" in slot]  # fmt: skip
        wanted = dense.weights[whole.weights["mlp.up_proj.weight"]].load()
        joined = torch.cat(rows)
        assert torch.equal(joined[joined[:, 0].argsort()], wanted[wanted[:, 0].argsort()])


def test_without_active_experts_the_best_neurons_stay_and_no_router(dense, tmp_path):
    program, entry = carved(dense, tmp_path, "shared=6,active=0,experts=8")
    function = program.functions[program.calls[find_blocks(program)[0].position].function]
    assert not {"experts", "top_gates"} & {node.op for node in function.nodes}
    slots = [slot for slot in function.weights if slot.startswith("mlp.")]
    assert all(slot.endswith(".shared") for slot in slots) and len(slots) == 3
    assert mean(entry, "routed") == mean(entry, "static")


@pytest.mark.parametrize("mode", ["fit", "faithful"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_two_matrices_and_biases_are_carved_too(family, mode, monkeypatch):
    from graphopt.passes import carve_moe

    ids = torch.randint(0, 128, (6, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(carve_moe, "calibration_windows", lambda *_: ids)
    program = capture(random_model(family))
    inputs = cases((7,))[0].inputs
    expected = Runner(program).logits(inputs)
    options = {"shared": 3, "active": 5, "experts": 8, "mode": mode, "seqlen": 32}
    result = make_pass("carve-moe", options).run(program.copy(), Context())
    found = Runner(result.program).logits(inputs)
    assert result.changed == 4
    assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))
    sparse = make_pass("carve-moe", {**options, "active": 2}).run(program.copy(), Context())
    assert not torch.allclose(Runner(sparse.program).logits(inputs), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "magic"}, "no mode 'magic'"),
        ({"shared": 5, "active": 4}, "5 shared and 4 active"),
        ({"shared": 0, "active": 0}, "0 shared and 0 active"),
        ({"shared": 8, "active": 0, "experts": 1}, "experts=1 is below 2"),
        ({"experts": 7}, "which 7 pieces do not divide"),
        ({"experts": 96, "shared": 3}, "one for each piece"),
        ({"windows": 1}, "windows=1 is below 2"),
    ],
)
def test_wrong_options_are_refused_before_a_weight_is_read(options, message):
    program = capture(random_model("llama"))
    with pytest.raises(PassError, match=message) as caught:
        make_pass("carve-moe", options).check(program)
    assert caught.value.remedy


def test_a_model_of_experts_is_refused():
    with pytest.raises(PassError, match="no feed-forward part to carve"):
        make_pass("carve-moe", {}).check(capture(random_model("mixtral")))


def test_too_few_windows_are_refused_with_the_numbers(dense, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:150], encoding="utf-8")
    with pytest.raises(PassError, match="has 1 windows of 96 tokens"):
        go.Pipeline.parse("carve-moe{seqlen=96}").run(dense, calib=text)


def test_a_program_without_a_tokenizer_is_refused():
    from graphopt.errors import GraphoptError

    with pytest.raises(GraphoptError):
        go.Pipeline.parse("carve-moe{experts=4,shared=1,active=1}").run(tiny_program(layers=2))


@pytest.mark.parametrize("mode", ["fit", "faithful"])
def test_the_emitted_forms_give_what_the_program_gives(dense, tmp_path, mode):
    from graphopt.evaluate import open_language_model

    program, _ = carved(dense, tmp_path, f"shared=2,active=2,experts=8,mode={mode}")
    go.emit(program, tmp_path / "out", emit=("torch", "onnx"))
    ids = torch.arange(40).view(2, 20)
    expected = Runner(program).logits({"input_ids": ids})
    for backend in ("torch", "onnx"):
        found = open_language_model(str(tmp_path / "out"), backend=backend).logits(ids)
        # Two experts of nearly one score may change places in another order of adding up.
        close = ((found - expected).abs() < 1e-4 * float(expected.abs().max())).all(-1)
        assert float(close.float().mean()) > 0.95, backend


def test_tuning_lowers_perplexity_and_moves_experts_and_router(dense, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    recipe = (
        f"carve-moe{{shared=1,active=1,experts=8,seqlen={LENGTH},windows=24}},"
        f"tune-moe{{steps=80,batch=8,seqlen={LENGTH},rate=0.0005}}"
    )
    program, report = go.Pipeline.parse(recipe).run(dense, calib=text)
    json.dumps(report.to_json(), allow_nan=False)
    steps = {step["after"]: step["value"] for step in report.passes[1].details["perplexity"]}
    assert steps["the whole model"] < steps["trained"] < steps["carving"]
    # At least half of what carving cost, in nats.
    whole, carving, trained = (
        math.log(steps[s]) for s in ("the whole model", "carving", "trained")
    )
    assert trained - whole < 0.5 * (carving - whole)
    fresh, _ = carved(dense, tmp_path, "shared=1,active=1,experts=8")
    moved = {
        name: float((program.weights[name].load() - fresh.weights[name].load()).abs().max())
        for name in (w.name for w in program.used_weights())
        if "router" in name or ".experts" in name
    }
    assert len(moved) == 4 * 5 and all(value > 1e-6 for value in moved.values()), moved
    attrs = [n.attrs for f in program.functions.values() for n in f.nodes if n.op == "top_gates"]
    assert attrs and all("surrogate" not in item for item in attrs)


def test_tuning_needs_a_carved_model(dense):
    with pytest.raises(PassError, match="must come after 'carve-moe'"):
        go.Pipeline.parse("tune-moe").run(dense)


def test_a_soft_choice_changes_no_gate_and_has_a_gradient():
    from graphopt.ir.ops import get_op

    scores = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (hard,) = get_op("top_gates").torch([scores], {"count": 2})
    (soft,) = get_op("top_gates").torch([scores], {"count": 2, "surrogate": True})
    assert torch.equal(hard, soft) and not hard.requires_grad
    soft[:, 0].sum().backward()
    assert bool((scores.grad[:, 0] > 0).all()) and float(scores.grad[:, 1:].abs().max()) == 0.0
