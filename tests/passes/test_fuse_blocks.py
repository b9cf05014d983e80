"""Recovery after depth pruning: every mode on a model that has learnt something."""

from __future__ import annotations

import json
import math

import pytest
import torch
from programs import tiny_program
from tiny_models import save_tiny
from trained import LENGTH, book, trained_program

import graphopt as go
from graphopt.errors import PassError, UsageError
from graphopt.execute.block_runner import BlockRunner
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import find_blocks, remove_blocks
from graphopt.pass_manager.contract import Context, Earlier, make_pass
from graphopt.passes.fuse_blocks.injection import Injection, group_of, require_equal
from graphopt.passes.prune_blocks.record import PrunedBlocks
from graphopt.training.distil import Distiller

TEXT = book()[:10000]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return trained_program(tmp_path_factory, layers=8)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return go.capture(str(save_tiny(tmp_path_factory.mktemp("untrained"), num_hidden_layers=8)))


def fused(dense, tmp_path, pruning, fusion, work=None, **options):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    recipe = f"prune-blocks{{{pruning},seqlen={LENGTH}}},fuse-blocks{{{fusion},seqlen={LENGTH}}}"
    program, report = go.Pipeline.parse(recipe).run(
        dense, go.RunOptions(calib=text, **options), work=work
    )
    # Whatever a report holds is plain JSON.
    json.dumps(report.to_json(), allow_nan=False)
    return program, report.passes[0], report.passes[1]


def steps_of(entry):
    return [(step["after"], step["value"]) for step in entry.details["perplexity"]]


@pytest.mark.slow
def test_layers_may_be_brought_to_the_device_one_by_one(dense, tmp_path, monkeypatch):
    """Where weights have no room on the device, blocks that are not trained are not held there."""
    options = ("blocks=2", "mode=local,group=3,steps=4,batch=2,warm_start=false")
    held, _, _ = fused(dense, tmp_path, *options)
    runners = []
    made = BlockRunner.__init__

    def noted(self, *args, **kwargs):
        made(self, *args, **kwargs)
        runners.append(self)

    monkeypatch.setattr(BlockRunner, "__init__", noted)
    monkeypatch.setattr(Distiller, "streams", True)
    streamed, _, entry = fused(dense, tmp_path, *options)
    assert entry.changed == 2
    assert len(runners) > 4 and not any(runner._kept for runner in runners)
    for weight in held.used_weights():
        assert torch.equal(weight.load(), streamed.weights[weight.name].load()), weight.name


# ---- the modes, on a trained model ----


@pytest.mark.slow
def test_distilling_takes_back_half_of_what_removal_cost(dense, tmp_path):
    program, _, entry = fused(
        dense, tmp_path, "ratio=0.25", "steps=80,batch=8,rate=0.003", device="cpu"
    )
    assert len(find_blocks(program)) == 6 and program.config["num_hidden_layers"] == 6
    steps = dict(steps_of(entry))
    whole = steps["the whole model"]
    gap = math.log(steps["plain removal"] / whole)
    assert gap > 0.02
    assert steps["trained"] <= steps["warm start"] < steps["plain removal"]
    assert math.log(steps["trained"] / whole) < 0.5 * gap
    assert entry.verification == "measured"
    (training,) = entry.details["training"]
    assert training["steps"] == 80 and training["checks"][0][0] == 0
    assert set(entry.details["seconds"]) >= {"warm start", "training", "all"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fusion",
    [
        "mode=local,steps=60,batch=8,group=3,rate=0.004",
        "steps=40,batch=8,train=low-rank,rank=4",
        "steps=20,batch=8,generated_windows=4",
        # The two parts of the others alone: what is trained, from what was removed.
        pytest.param("steps=40,batch=8,warm_start=false,rate=0.004", marks=pytest.mark.exhaustive),
    ],
)
def test_every_other_mode_does_better_than_plain_removal(dense, tmp_path, fusion):
    program, _, entry = fused(dense, tmp_path, "remove=[3,6]", fusion)
    steps = steps_of(entry)
    assert steps[-1][1] < dict(steps)["plain removal"]
    assert ("warm start" in dict(steps)) == ("warm_start=false" not in fusion)
    assert len(find_blocks(program)) == 6
    # A stock model: the same functions, every weight in the checkpoint's dtype and on the CPU.
    assert set(program.functions) == set(dense.functions)
    for weight in program.weights:
        assert weight.load().device == CPU
        assert weight.dtype == dense.weights[weight.name].dtype


@pytest.mark.slow
@pytest.mark.parametrize(
    "donor",
    [
        "pruned",
        # The others are among the ablations below, with fewer steps.
        pytest.param("none", marks=pytest.mark.exhaustive),
        pytest.param("self", marks=pytest.mark.exhaustive),
        pytest.param("random", marks=pytest.mark.exhaustive),
    ],
)
def test_the_published_mode_lowers_the_papers_loss(dense, tmp_path, donor):
    fusion = f"mode=published,steps=60,batch=8,group=4,rank=8,donor={donor}"
    program, _, entry = fused(dense, tmp_path, "remove=[3,6]", fusion)
    assert [part["steps"] for part in entry.details["training"]] == [30, 30]
    for part in entry.details["training"]:
        losses = [loss for _, loss in part["checks"]]
        assert min(losses) < losses[0]
    assert entry.details["order"] == [3, 6] and len(find_blocks(program)) == 6


@pytest.mark.slow
def test_controls_fuse_the_first_block_by_every_donor_and_change_nothing_else(dense, tmp_path):
    fusion = "mode=published,steps=8,batch=8,group=4,rank=4"
    alone, _, _ = fused(dense, tmp_path, "remove=[3,6]", fusion)
    program, _, entry = fused(dense, tmp_path, "remove=[3,6]", f"{fusion},ablations=true")
    ablations = entry.details["ablations"]
    assert [ablation["donor"] for ablation in ablations] == ["pruned", "self", "random", "none"]
    losses = [ablation["loss"] for ablation in ablations]
    assert losses[0] == min(loss for _, loss in entry.details["training"][0]["checks"])
    assert len(set(losses)) == 4 and all(ablation["perplexity"] > 1 for ablation in ablations)
    assert [part["steps"] for part in entry.details["training"]] == [4, 4]
    for weight in alone.used_weights():
        assert torch.equal(weight.load(), program.weights[weight.name].load())


def removing(*blocks):
    """A pruning pass that ran, and what it told."""
    names = [f"model.layers.{number}" for number in blocks]
    record = PrunedBlocks(order=[str(number) for number in blocks], removed=names)
    return Earlier(make_pass("prune-blocks", {"remove": list(blocks)}), record)


@pytest.mark.slow
def test_groups_reach_from_the_first_cut_to_the_end_and_aim_behind_what_is_missing(untrained):
    from graphopt.passes.fuse_blocks.fusion import Fusion

    pruned = untrained.copy()
    remove_blocks(pruned, [2, 5])
    context = Context(TEXT, tokenizer=None)
    context.dense = untrained
    context.earlier.append(removing(2, 5))
    options = make_pass("fuse-blocks", {"mode": "local", "group": 2, "seqlen": LENGTH})
    fusion = Fusion(options, pruned, context)
    # Blocks 0 1 3 4 6 7 of the whole model: from 1 on, in pairs, the last one whole.
    assert fusion._groups() == [(1, 3), (3, 5), (4, 6)]
    calls = [pruned.calls[block.position] for block in find_blocks(pruned)]
    places = [block.position for block in find_blocks(untrained)]
    assert [places.index(fusion._behind(call)) for call in calls] == [0, 2, 3, 5, 6, 7]


@pytest.mark.slow
def test_the_result_is_a_checkpoint_that_transformers_loads(dense, tmp_path):
    from transformers import AutoModelForCausalLM

    program, _, _ = fused(dense, tmp_path, "blocks=2", "steps=4,batch=4")
    go.emit(program, tmp_path / "out", emit=("hf",))
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "hf", output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(model.model.layers) == model.config.num_hidden_layers == 6
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = model(ids).logits
    ours = Runner(program).logits({"input_ids": ids})
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


@pytest.mark.slow
def test_an_interrupted_compile_goes_on_behind_the_last_stage(dense, tmp_path, monkeypatch):
    from graphopt.passes.fuse_blocks import fusion

    straight, _, whole = fused(
        dense, tmp_path, "remove=[3,6]", "mode=published,steps=20,batch=8,group=4,rank=4"
    )
    real, calls = fusion.Fusion._fuse_one, []

    def stops(self, place, what, schedule, donor):
        calls.append(what)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, place, what, schedule, donor)

    monkeypatch.setattr(fusion.Fusion, "_fuse_one", stops)
    options = {"work": tmp_path / "work"}
    recipe = ("remove=[3,6]", "mode=published,steps=20,batch=8,group=4,rank=4")
    with pytest.raises(KeyboardInterrupt):
        fused(dense, tmp_path, *recipe, **options)
    resumed, _, entry = fused(dense, tmp_path, *recipe, resume=True, **options)
    assert calls == ["fusing model.layers.3", "fusing model.layers.6", "fusing model.layers.6"]
    assert [step for step, _ in steps_of(entry)] == [step for step, _ in steps_of(whole)]
    for weight in straight.weights:
        assert torch.allclose(weight.load(), resumed.weights[weight.name].load(), atol=1e-6)


# ---- the paper's parts ----


def group_by_the_formula(place, neighbours, count):
    """Equation 2 with its numbers from 1: the window of G + 1 around p, shifted inside."""
    members = [(place + 1) - neighbours // 2 + i for i in range(neighbours + 1)]
    shift = max(1 - members[0], 0) - max(members[-1] - count, 0)
    return members[0] + shift - 1, members[-1] + shift - 1


@pytest.mark.parametrize("neighbours", [1, 2, 7])
def test_groups_are_those_of_the_formula(neighbours):
    for count in (neighbours + 2, 12, 32):
        for place in range(count):
            assert group_of(place, neighbours, count) == group_by_the_formula(
                place, neighbours, count
            )
    assert group_of(1, 7, 8) == (0, 7)
    assert group_of(2, 7, 3) == (0, 2)
    # Seven neighbours: three in front, four behind.
    assert group_of(15, 7, 32) == (12, 19)


def test_an_injection_starts_as_plain_removal_and_folds_to_what_it_computed():
    generator = torch.Generator().manual_seed(0)
    own, donor = torch.randn(2, 10, 14, generator=generator)
    form = Injection(own, donor, 3, generator)
    assert torch.equal(form(), own)
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(5, 14, generator=generator).double()
    left, right = form.coefficients_left.double(), form.coefficients_right.double()
    low = form.up.double() @ form.down.double()
    expected = x @ own.double().T + x @ low.T + x @ ((left @ right) * donor.double()).T
    assert float((x @ form().double().T - expected).abs().max()) < 1e-4
    assert torch.equal(form.base, own) and torch.equal(form.donor, donor)
    trained = {name for name, _ in form.named_parameters()}
    assert trained == {"coefficients_left", "coefficients_right", "up", "down"}


def test_every_donor_has_as_many_parameters():
    generator = torch.Generator().manual_seed(0)
    own, donor = torch.randn(2, 10, 14, generator=generator)
    sizes = {
        sum(p.numel() for p in Injection(own, given, 3, generator).parameters())
        for given in (donor, own, None)
    }
    assert sizes == {2 * 3 * (10 + 14)}


def test_blocks_that_differ_are_refused_with_the_pair():
    program = tiny_program(layers=4)
    calls = [program.calls[block.position] for block in find_blocks(program)]
    require_equal(program, calls)
    clone = program.functions["block"].clone("other")
    program.functions["other"] = clone
    calls[2].function = "other"
    with pytest.raises(PassError, match=r"layers\.0.* and .*layers\.2.*different kinds"):
        require_equal(program, calls)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "magic"}, "no mode 'magic'"),
        ({"donor": "other"}, "no donor 'other'"),
        ({"train": "none"}, "no train 'none'"),
        ({"seconds": -1.0}, "seconds=-1.0 is below 0"),
        ({"batch": 0}, "batch=0 is below 1"),
        ({"mode": "published", "batch": 1}, "batch=1 has one"),
        ({"group": 1}, "group=1 is below 2"),
        ({"ablations": True}, "mode=distil has none"),
        ({"rank": 0}, "rank=0 is below 1"),
    ],
)
def test_a_pass_with_wrong_options_cannot_be_made(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_pass("fuse-blocks", options)
    assert caught.value.remedy


def test_without_a_pruning_pass_there_is_nothing_to_fuse(untrained):
    with pytest.raises(PassError, match="must come after 'prune-blocks'"):
        go.Pipeline.parse("fuse-blocks").run(untrained)
    with pytest.raises(PassError, match="from which prune-blocks removed"):
        make_pass("fuse-blocks", {}).run(untrained.copy(), Context())


def test_a_text_that_is_too_short_is_refused_with_the_numbers(untrained):
    context = Context("a short text", tokenizer=None)
    context.dense = untrained
    context.earlier.append(removing(1))
    pruned = untrained.copy()
    remove_blocks(pruned, [1])
    with pytest.raises(PassError, match=r"has 12 tokens, and a window takes 64"):
        make_pass("fuse-blocks", {"steps": 1, "seqlen": 64}).run(pruned, context)


def test_the_published_mode_refuses_parts_of_blocks(untrained, tmp_path):
    with pytest.raises(PassError, match="fuses whole blocks"):
        fused(untrained, tmp_path, "blocks=1,part=ffn", "mode=published,steps=1")
