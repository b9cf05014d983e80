"""Feed-forward parts carved into experts: figures, exactness, and what is refused."""

from __future__ import annotations

import functools
import itertools
import json
import math

import pytest
import torch
from families import captured, cases
from programs import tiny_program
from sampling import exhaustive_but
from torch.nn.functional import silu
from trained import LENGTH, book, trained_program

import graphopt as go
from graphopt.calibration.layer_sensitivity import measure_sensitivity
from graphopt.calibration.text import pick, text_windows
from graphopt.calibration.token_power import token_power
from graphopt.errors import PassError, UsageError
from graphopt.evaluate.perplexity import read_text
from graphopt.execute.block_runner import BlockRunner
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import find_blocks
from graphopt.ir.weights import Array, Weight
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.passes.carve_moe import activations
from graphopt.passes.carve_moe.parts import parts_of
from graphopt.passes.carve_moe.record import CarvedParts, Work
from graphopt.report.record import Step
from graphopt.support.per_device import PerDevice

TEXT = book()[:24000]
WINDOWS = 24


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return trained_program(tmp_path_factory, layers=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run_carving(program, text, options):
    recipe = f"carve-moe{{{options},seqlen={LENGTH},windows={WINDOWS}}}"
    program, report = go.Pipeline.parse(recipe).run(program, go.RunOptions(calib=text))
    json.dumps(report.to_json(), allow_nan=False)
    return program, report.passes[0]


@pytest.fixture(scope="module")
def carve(dense, text):
    """Return what carves the trained model, each way once; nobody may change the programs."""
    return functools.cache(lambda options: run_carving(dense, text, options))


def mean(entry, key):
    parts = entry.details["parts"]
    return sum(part[key] for part in parts) / len(parts)


@pytest.mark.slow
def test_a_fitted_router_beats_every_tokens_same_neurons_and_the_published_one(carve):
    _, fitted = carve("shared=2,active=2,experts=8")
    _, published = carve("shared=2,active=2,experts=8,mode=published")
    assert fitted.verification == "measured" and fitted.changed == 4
    assert mean(fitted, "oracle") <= mean(fitted, "routed") < mean(fitted, "random")
    assert mean(fitted, "routed") < mean(fitted, "static")
    assert mean(fitted, "routed") < mean(published, "routed")
    for part in fitted.details["parts"]:
        # Every token runs two of six.
        assert sum(part["load"]) == pytest.approx(2.0) and len(part["load"]) == 6


@pytest.mark.slow
def test_indicators_of_cosines_divide_otherwise(carve):
    both = [
        carve(f"shared=2,active=2,experts=8,mode=published{more}")[0]
        for more in ("", ",cosine=true")
    ]
    first, other = (
        next(weight.load() for weight in program.used_weights() if "up_proj" in weight.name)
        for program in both
    )
    assert first.shape == other.shape and not torch.equal(first, other)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fit", "published", "published,cosine=true"])
@pytest.mark.parametrize("shared", [0, 3])
def test_all_experts_active_is_the_model_itself(dense, carve, mode, shared):
    options = f"shared={shared},active={8 - shared},experts=8,mode={mode}"
    program, _ = carve(options)
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


@pytest.mark.slow
def test_neurons_of_zeros_fill_pieces_and_change_nothing(dense, carve):
    program, entry = carve("shared=3,active=4,experts=7,pad=true")
    # 128 neurons are five short of 7 times 19.
    assert [part["added"] for part in entry.details["parts"]] == [5] * 4
    ids = {"input_ids": torch.arange(40).view(2, 20)}
    expected, found = Runner(dense).logits(ids), Runner(program).logits(ids)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    for weight in program.used_weights():
        if "up_proj" in weight.name:
            assert weight.shape[0] % 19 == 0
    sparse, entry = carve("shared=2,active=2,experts=7,pad=true")
    assert mean(entry, "routed") < mean(entry, "random")
    assert torch.isfinite(Runner(sparse).logits(ids)).all()


@pytest.mark.slow
def test_reconstructed_projections_bring_the_stream_nearer_and_else_no_value_changes(
    dense, text, carve
):
    options = "shared=2,active=2,experts=8"
    plain, entry = carve(options + ",reconstruct=false")
    assert entry.details["reconstructions"] == []
    for block, own in zip(find_blocks(plain), find_blocks(dense), strict=True):
        call, whole = plain.calls[block.position], dense.calls[own.position]
        joined = torch.cat([plain.weights[name].load() for slot, name in call.weights.items()
                            if "down_proj" in slot], 1)  # fmt: skip
        wanted = dense.weights[whole.weights["mlp.down_proj.weight"]].load()
        assert torch.equal(joined.sort(1).values, wanted.sort(1).values)
    reconstructed, entry = carve(options)
    reconstructions = entry.details["reconstructions"]
    assert len(reconstructions) == 4 and all(0 < r["after"] < r["before"] for r in reconstructions)
    check_normal_equations(dense, text, plain, reconstructed, reconstructions[0])


def values_of_first_block(program, ids):
    """Return what the nodes of a program's first block make by op, and its ffn's weights."""
    block = find_blocks(program)[0].position
    function = program.functions[program.calls[block].function]
    runner = BlockRunner(program, block, block + 1, {}, torch.device("cpu"))
    values, seen = runner.window_inputs(ids), {}

    def observe(value, tensor):
        if value.node is not None:
            seen.setdefault(value.node.op, []).append(tensor)

    with torch.no_grad():
        for _ in runner.run_calls([values], 0, block + 1, observe=observe):
            pass
    weights = {s: program.weights[n].load() for s, n in program.calls[block].weights.items()}
    assert function.results[0].node.op == "add"
    return seen, {s.removeprefix("mlp."): value for s, value in weights.items() if "mlp." in s}


def check_normal_equations(dense, text, plain, reconstructed, outcome):
    """Of the first block, where the two carvings divide alike: no other weights are nearer.

    The gradient of the squared errors, each in units of its token's power, is that of the pull
    towards the weights as they were.
    """
    ids = pick(text_windows(dense, read_text(text), LENGTH), WINDOWS, seed=0)
    seen, old = values_of_first_block(plain, ids)
    new = values_of_first_block(reconstructed, ids)
    goal, behind = (values["add"][-1].flatten(0, 1) for values in (
        values_of_first_block(dense, ids)[0], new[0]
    ))  # fmt: skip
    x, gates = seen["rms_norm"][-1].flatten(0, 1), seen["top_k_gating"][0].flatten(0, 1)
    hidden = {
        end: silu(x @ old[f"gate_proj.weight.{end}"].t()) * (x @ old[f"up_proj.weight.{end}"].t())
        for end in ("shared", "experts")
    }
    size = hidden["experts"].shape[1] // gates.shape[1]
    hidden["experts"] = hidden["experts"] * gates.repeat_interleave(size, 1)
    root = token_power(goal).rsqrt().double()
    features = torch.cat([hidden["shared"], hidden["experts"]], 1).double() * root
    change = torch.cat(
        [(new[1][f"down_proj.weight.{end}"] - old[f"down_proj.weight.{end}"]).t()
         for end in ("shared", "experts")]
    ).double()  # fmt: skip
    left, before = (features.t() @ ((goal - stream).double() * root) for stream in (
        behind, seen["add"][-1].flatten(0, 1)
    ))  # fmt: skip
    pull = outcome["ridge"] * features.square().sum(0).mean()
    assert outcome["ridge"] and float(change.abs().max()) > 1e-3
    # Sums over 2,304 tokens of what fp32 rounds.
    assert float((left - pull * change).abs().max()) < 1e-4 * float(before.abs().max())


@pytest.mark.slow
@pytest.mark.slow
def test_activations_that_are_held_give_what_those_made_anew_give(dense, text, monkeypatch):
    """A GPU with room holds them: in several batches they are made once, or for every sum."""
    monkeypatch.setattr(
        "graphopt.passes.carve_moe.text.TOKENS_AT_ONCE", PerDevice(cpu=512, gpu=512)
    )
    found = []
    for held in (False, True):
        if held:
            monkeypatch.setattr(activations, "_has_room", lambda *asked: True)
        program, entry = run_carving(dense.copy(), text, "shared=2,active=2,experts=8,rounds=3")
        found.append((entry.record.parts, [w.load() for w in program.used_weights()]))
    (parts, weights), (held_parts, held_weights) = found
    assert parts == held_parts
    assert all(map(torch.equal, weights, held_weights))


@pytest.mark.slow
def test_a_threshold_gives_tokens_the_experts_that_they_need(carve):
    _, fixed = carve("shared=2,active=2,experts=8")
    program, entry = carve("shared=2,active=2,experts=8,threshold=true")
    assert mean(entry, "routed") < mean(fixed, "routed")
    assert mean(entry, "oracle") < mean(fixed, "oracle")
    for part in entry.details["parts"]:
        # The thresholds were set on other windows. Of the 1,152 tokens here each runs 0 to 6
        # experts, with a standard deviation below 1.5: these are five standard errors.
        assert sum(part["load"]) == pytest.approx(2.0, abs=5 * 1.5 / 1152**0.5)
    nodes = [n for f in program.functions.values() for n in f.nodes]
    assert [n.attrs for n in nodes if n.op == "top_k_gating"] == [
        {"top_k": 6, "mean_active_experts": 2}
    ]
    assert entry.details["work"]["weight_products"] == fixed.details["work"]["weight_products"]


@pytest.mark.slow
def test_the_control_is_what_the_same_neurons_for_every_token_give(carve):
    _, routed = carve("shared=2,active=2,experts=8")
    _, static = carve("shared=4,active=0,experts=8")
    assert static.details["control"] is None
    whole, carved = (step["value"] for step in static.details["perplexity"])
    assert whole < carved == pytest.approx(routed.details["control"], rel=1e-5)


@pytest.mark.parametrize(("carved", "helps"), [(20.0, True), (25.0, False), (math.inf, False)])
def test_routing_that_is_no_better_than_its_control_is_said_loudly(carved, helps):
    steps = [Step(after="whole model", value=10.0), Step(after="carved", value=carved)]
    record = CarvedParts(
        split="S2A3E8", parts=[], work=Work(tokens=1, flops=(2, 1), weight_products=(2, 1)),
        perplexity=steps, control=25.0,
    )  # fmt: skip
    assert ("DOES NOT HELP" in record.line()) is not helps
    assert ("shared=5,active=0,experts=8" in record.line()) is not helps
    assert "25" in record.line() and record.verdict()[1:] in record.card()


@pytest.mark.slow
def test_the_work_is_that_of_the_formula(carve):
    _, entry = carve("shared=2,active=2,experts=8")
    work = entry.details["work"]
    # Of a block 3 * 48 * 128, half of which is not run, and a router of 6 rows.
    saved = 128 * 4 * (0.5 * 3 * 48 * 128 - 6 * 48)
    assert work["weight_products"][0] - work["weight_products"][1] == saved
    assert work["flops"][0] - work["flops"][1] == pytest.approx(2 * saved, rel=0.05)


def test_without_active_experts_the_best_neurons_stay_and_no_router(carve):
    program, entry = carve("shared=6,active=0,experts=8")
    function = program.functions[program.calls[find_blocks(program)[0].position].function]
    assert not {"experts", "top_k_gating"} & {node.op for node in function.nodes}
    slots = [slot for slot in function.weights if slot.startswith("mlp.")]
    assert all(slot.endswith(".shared") for slot in slots) and len(slots) == 3
    assert mean(entry, "routed") == mean(entry, "static")
    assert all(
        reconstruction["after"] < reconstruction["before"]
        for reconstruction in entry.details["reconstructions"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fit", "published"])
@pytest.mark.parametrize("family", exhaustive_but(["gpt2", "opt", "bloom"], "gpt2"))
def test_two_matrices_and_biases_are_carved_too(family, mode, monkeypatch):
    from graphopt.passes.carve_moe import text

    ids = torch.randint(0, 128, (6, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(text, "calibration_windows", lambda *_: ids)
    _, program = captured(family)
    inputs = cases((7,))[0].inputs
    expected = Runner(program).logits(inputs)
    options = {"shared": 3, "active": 5, "experts": 8, "mode": mode, "seqlen": 32}
    result = make_pass("carve-moe", options).run(program.copy(), Context())
    found = Runner(result.program).logits(inputs)
    assert result.changed == 4
    assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))
    sparse = make_pass("carve-moe", {**options, "active": 2}).run(program.copy(), Context())
    assert not torch.allclose(Runner(sparse.program).logits(inputs), expected, atol=1e-3)


def louder(dense, number, by):
    """Return a program one of whose feed-forward parts adds `by` times as much."""
    program = dense.copy()
    call = program.calls[find_blocks(program)[number].position]
    weight = program.weights[call.weights["mlp.down_proj.weight"]]
    program.weights.replace(Weight(weight.name, Array(by * weight.load()), weight.checkpoint))
    return program


@pytest.mark.slow
@pytest.mark.parametrize("active", [0, 2])
def test_parts_that_matter_more_get_more_pieces_of_one_budget(dense, text, active):
    options = f"shared=3,active={active},experts=8,layerwise_budget=true"
    unequal = louder(dense, 2, by=4.0)
    program, entry = run_carving(unequal, text, options)
    blocks = find_blocks(program)
    assert [part["where"] for part in entry.details["sensitivity"]] == [
        f"model.layers.{n}" for n in range(4)
    ]
    shared = {part["where"]: part["shared"] for part in entry.details["parts"]}
    whole = {skip.where for skip in entry.skipped if skip.reason == "all of its groups are run"}
    numbers = [
        8 - active if (where := f"model.layers.{n}") in whole else shared[where] for n in range(4)
    ]
    # No other numbers, of which there are as many in all, are expected to cost less.
    ids = pick(text_windows(unequal, read_text(text), LENGTH), WINDOWS, seed=0)
    parts = {n: part for n, (_, part) in enumerate(parts_of(unequal))}
    measured = measure_sensitivity(unequal, parts, ids[: 512 // LENGTH], 8, 3 + active)
    costs = {
        chosen: sum(measured[n].kl_at(own + active) for n, own in enumerate(chosen))
        for chosen in itertools.product(range(not active, 9 - active), repeat=4)
        if sum(chosen) <= 4 * 3
    }
    assert costs[tuple(numbers)] == pytest.approx(min(costs.values()), rel=1e-6)
    assert sum(numbers) == 4 * 3 and max(numbers) > min(numbers)
    for number, block in zip(numbers, blocks, strict=True):
        call = program.calls[block.position]
        rows = {slot: program.weights[name].shape[0] for slot, name in call.weights.items()
                if "up_proj" in slot}  # fmt: skip
        if number == 8 - active:
            assert rows == {"mlp.up_proj.weight": 128}
        else:
            found = {"mlp.up_proj.weight.shared": 16 * number}
            found |= {"mlp.up_proj.weight.experts": 128 - 16 * number} if active else {}
            assert rows == {slot: count for slot, count in found.items() if count}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "magic"}, "no mode 'magic'"),
        ({"shared": 5, "active": 4}, "5 shared and 4 active"),
        ({"shared": 0, "active": 0}, "0 shared and 0 active"),
        ({"shared": 8, "active": 0, "experts": 1}, "experts=1 is below 2"),
        ({"pad": True, "mode": "published"}, "one of the zeros"),
        ({"threshold": True, "mode": "published"}, "mode=published has none"),
        ({"layerwise_budget": True, "shared": 0}, "shared=0 has none"),
        ({"layerwise_budget": True, "shared": 5}, "no part is to run fewer than all"),
        ({"cosine": True}, "mode=fit goes by the energy"),
        ({"threshold": True, "active": 0}, "active=0 has none"),
        ({"windows": 1}, "windows=1 is below 2"),
    ],
)
def test_a_pass_with_wrong_options_cannot_be_made(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_pass("carve-moe", options)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 7}, "which 7 groups do not divide"),
        ({"experts": 200, "pad": True}, "200 groups need more than one each"),
        ({"mode": "published", "k_activations": 97}, "97 cannot be the largest"),
        ({"experts": 96, "shared": 3}, "96 groups need more than one each"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_a_weight_is_read(options, message):
    with pytest.raises(PassError, match=message) as caught:
        make_pass("carve-moe", options).check(tiny_program(ffn=96))
    assert caught.value.remedy


def test_a_width_that_is_not_divided_is_answered_with_what_would_do():
    with pytest.raises(PassError) as caught:
        make_pass("carve-moe", {"experts": 7}).check(tiny_program(ffn=96))
    assert caught.value.remedy == "Take experts=6, or add neurons of zeros with pad=true."


def test_a_carved_model_is_not_carved_again(carve):
    program, _ = carve("shared=2,active=2,experts=8")
    with pytest.raises(PassError, match="carved into experts already"):
        make_pass("carve-moe", {}).check(program)


@pytest.mark.parametrize("mode", ["fit", "published"])
def test_too_few_tokens_for_the_indicators_are_refused(dense, text, mode):
    recipe = f"carve-moe{{mode={mode},windows=2,seqlen=4}}"
    with pytest.raises(PassError, match=r"4 tokens .*, by the 1. largest neurons of each"):
        go.Pipeline.parse(recipe).run(dense, go.RunOptions(calib=text))


@pytest.mark.slow
def test_a_model_of_experts_is_refused():
    with pytest.raises(PassError, match="no feed-forward part to carve"):
        make_pass("carve-moe", {}).check(captured("mixtral")[1])


def test_too_few_windows_are_refused_with_the_numbers(dense, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:150], encoding="utf-8")
    with pytest.raises(PassError, match="has 1 window of 96 tokens"):
        go.Pipeline.parse("carve-moe{seqlen=96}").run(dense, go.RunOptions(calib=text))


def test_a_program_without_a_tokenizer_is_refused():
    from graphopt.errors import GraphoptError

    with pytest.raises(GraphoptError):
        go.Pipeline.parse("carve-moe{experts=4,shared=1,active=1}").run(tiny_program(layers=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    exhaustive_but(
        ["fit", "published", "fit,threshold=true", "fit,layerwise_budget=true"],
        "published",
        "fit,threshold=true",
    ),
)
def test_the_emitted_forms_give_what_the_program_gives(carve, tmp_path, mode):
    from graphopt.backends.opening import open_language_model

    program, _ = carve(f"shared=2,active=2,experts=8,mode={mode}")
    go.emit(program, tmp_path / "out", emit=("torch", "onnx"))
    ids = torch.arange(40).view(2, 20)
    expected = Runner(program).logits({"input_ids": ids})
    for backend in ("torch", "onnx"):
        found = open_language_model(str(tmp_path / "out"), backend=backend).logits(ids)
        # Two experts of nearly one score may change places in another order of adding up.
        close = ((found - expected).abs() < 1e-4 * float(expected.abs().max())).all(-1)
        assert float(close.float().mean()) > 0.95, backend


@pytest.mark.slow
def test_tuning_lowers_perplexity_and_moves_experts_and_router(dense, carve, text):
    recipe = (
        f"carve-moe{{shared=1,active=1,experts=8,seqlen={LENGTH},windows={WINDOWS}}},"
        f"tune-moe{{steps=80,batch=8,seqlen={LENGTH},rate=0.006,"
        "surrogate=true,balance=0.001}"
    )
    program, report = go.Pipeline.parse(recipe).run(dense, go.RunOptions(calib=text))
    json.dumps(report.to_json(), allow_nan=False)
    steps = {step["after"]: step["value"] for step in report.passes[1].details["perplexity"]}
    # At least half of what carving cost, in nats.
    whole, carving, trained = (
        math.log(steps[s]) for s in ("the whole model", "carving", "trained")
    )
    assert carving > whole and trained - whole < 0.5 * (carving - whole)
    fresh, _ = carve("shared=1,active=1,experts=8")
    moved = {
        name: float((program.weights[name].load() - fresh.weights[name].load()).abs().max())
        for name in (w.name for w in program.used_weights())
        if name in fresh.weights and ("router" in name or ".experts" in name)
    }
    assert len(moved) == 4 * 5 and all(value > 1e-6 for value in moved.values()), moved
    for kind in ("selection_bias", "gate_scale"):
        values = [w.load() for w in program.used_weights() if w.name.endswith(f"router.{kind}")]
        assert len(values) == 4 and all(0 < float(v.abs().max()) < 0.1 for v in values)
    loads = report.passes[1].details["loads"]
    assert len(loads) == 4 and all(sum(x[k]) == pytest.approx(1) for x in loads
                                   for k in ("before", "after"))  # fmt: skip
    attrs = [n.attrs for f in program.functions.values() for n in f.nodes if n.op == "top_k_gating"]
    assert attrs and all("surrogate" not in item for item in attrs)


def test_tuning_needs_a_carved_model(dense):
    with pytest.raises(PassError, match="must come after 'carve-moe'"):
        go.Pipeline.parse("tune-moe").run(dense)


def test_a_soft_choice_changes_no_gate_and_has_a_gradient():
    from graphopt.ir.ops import get_op

    scores = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (hard,) = get_op("top_k_gating").torch([scores], {"top_k": 2})
    (soft,) = get_op("top_k_gating").torch([scores], {"top_k": 2, "surrogate": True})
    assert torch.equal(hard, soft) and not hard.requires_grad
    soft[:, 0].sum().backward()
    assert bool((scores.grad[:, 0] > 0).all()) and float(scores.grad[:, 1:].abs().max()) == 0.0
