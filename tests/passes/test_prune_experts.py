"""prune-experts: scores, dropping, merging, what is told, and what is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from families import mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import drop, mixture, mixture_model, program_of
from programs import tiny_program
from tiny_models import VOCAB, byte_tokenizer
from trained import book

import graphopt as go
from graphopt.calibration.expert_saliency import measure_experts
from graphopt.errors import PassError, UsageError
from graphopt.execute.interpreter import Runner
from graphopt.ir import Program
from graphopt.ir.blocks import find_blocks
from graphopt.ir.mixture import Mixture, find_mixtures
from graphopt.pass_manager.contract import make_pass
from graphopt.passes.prune_experts.merging import merge_experts
from graphopt.passes.prune_experts.reconstruction import reconstruct_experts
from graphopt.passes.prune_experts.record import PrunedExperts, PrunedMixture
from graphopt.report.record import Step
from graphopt.solvers.matching import greedy_pairs
from graphopt.support.progress import silent

CPU = torch.device("cpu")


def _windows(count: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(2))


def _mixtures(program: Program) -> dict[int, Mixture]:
    places = {block.position: index for index, block in enumerate(find_blocks(program))}
    return {places[block.position]: part for block, part in find_mixtures(program)}


@pytest.mark.slow
@torch.no_grad()
def test_saliency_is_that_of_every_expert_run_alone_in_fp64():
    model, program = mixture("mixtral")
    windows = _windows()
    found = measure_experts(program, _mixtures(program), windows, CPU)
    inputs: list[torch.Tensor] = []
    behind: list[torch.Tensor] = []
    energies = torch.zeros(2, 8, dtype=torch.float64)
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for layer in model.model.layers
    ] + [
        layer.register_forward_hook(lambda _, args, output: behind.append(output))
        for layer in model.model.layers
    ]
    model(windows)
    for hook in hooks:
        hook.remove()
    for index, (layer, x) in enumerate(zip(model.model.layers, inputs, strict=True)):
        x_TD, experts = x.flatten(0, 1).double(), layer.mlp.experts
        gates, chosen = torch.softmax(x_TD @ layer.mlp.gate.weight.double().T, -1).topk(2)
        gates = gates / gates.sum(-1, keepdim=True)
        activity = found[index]
        for expert in range(8):
            gate, up = (x_TD @ experts.gate_up_proj[expert].double().T).chunk(2, -1)
            norms = ((F.silu(gate) * up) @ experts.down_proj[expert].double().T).norm(dim=-1)
            runs = chosen == expert
            count = int(runs.sum())
            weighted = float((norms * (gates * runs).sum(-1)).sum())
            assert count == int(activity.tokens[expert])
            assert float(activity.saliency("reap")[expert]) == pytest.approx(
                weighted / count if count else 0.0, rel=1e-5
            )
            assert float(activity.saliency("ean")[expert]) == pytest.approx(
                float((norms * runs.any(-1)).sum()), rel=1e-5
            )
            power = behind[index].flatten(0, 1).double().square().sum(-1)
            terms = (norms * (gates * runs).sum(-1)).square() / power
            energies[index, expert] = float(terms.sum())
            share = float(activity.saliency("frequency")[expert])
            assert share == pytest.approx(count / chosen.numel())
        wanted = energies[index] / energies[index].sum()
        assert torch.allclose(activity.saliency("energy"), wanted, rtol=1e-5, atol=0)


def _with_unused(unused: tuple[int, ...]) -> Program:
    """Return a program of which some experts are chosen by no token."""
    model = mixture_model("gpt_oss")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[list(unused)] = -1e3
    return program_of(model)


@pytest.mark.slow
def test_experts_that_no_token_runs_score_0_and_dropping_them_changes_nothing():
    program = _with_unused((2, 5))
    windows = _windows()
    for activity in measure_experts(program, _mixtures(program), windows, CPU).values():
        scores = activity.saliency("reap")
        assert [e for e in range(8) if scores[e] == 0] == [2, 5]
    before, after = program, drop(program, [0, 1, 3, 4, 6, 7])
    logits = [Runner(p).logits({"input_ids": windows}) for p in (before, after)]
    assert torch.allclose(*logits, rtol=0, atol=2e-6 * float(logits[0].abs().max()))


def _permuted_copy(family: str) -> Program:
    """Return a program whose expert 6 is expert 1 with its neurons in another order."""
    model = mixture_model(family)
    halves = family == "mixtral"
    with torch.no_grad():
        for layer in model.model.layers:
            experts = layer.mlp.experts
            first, last = experts.gate_up_proj, experts.down_proj
            width = last.shape[2] if halves else last.shape[1]
            order = torch.randperm(width, generator=torch.Generator().manual_seed(3))
            if halves:
                first[6] = first[1][torch.cat([order, order + width])]
                last[6] = last[1][:, order]
            else:
                pairs = torch.stack([2 * order, 2 * order + 1], 1).flatten()
                first[6], experts.gate_up_proj_bias[6] = (
                    first[1][:, pairs], experts.gate_up_proj_bias[1][pairs],
                )  # fmt: skip
                last[6], experts.down_proj_bias[6] = last[1][order], experts.down_proj_bias[1]
    return program_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", mostly_slow(["mixtral", "gpt_oss"], ("mixtral",)))
def test_an_expert_with_its_neurons_in_another_order_is_merged_into_itself(family):
    program = _permuted_copy(family)
    kept = [0, 1, 2, 3, 4, 5, 7]
    pruned = drop(program, kept)
    dropped = pruned.copy()
    mixtures, windows = _mixtures(program), _windows()
    activity = measure_experts(program, mixtures, windows, CPU)
    merged = merge_experts(
        program, pruned, mixtures, dict.fromkeys(mixtures, kept), activity, windows, CPU, silent,
    )  # fmt: skip
    for found in merged.values():
        assert found.into == {6: 1} and found.likeness[6] == pytest.approx(1)
    for weight in dropped.used_weights():
        now = pruned.weights[weight.name].load()
        assert torch.allclose(now, weight.load(), rtol=0, atol=1e-6), weight.name


def test_what_reconstruction_leaves_over_is_what_the_program_lacks():
    _, program = mixture("mixtral")
    kept = [0, 2, 3, 5, 6, 7]
    pruned, windows = drop(program, kept), _windows(8)
    first = reconstruct_experts(program, pruned, [0, 1], windows, CPU, silent)
    assert all(outcome.after < outcome.before for outcome in first)
    # Measured again on the program as it is now.
    again = reconstruct_experts(program, pruned, [0], windows, CPU, silent)
    assert again[0].before == pytest.approx(first[0].after, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10_000), st.booleans())
def test_greedy_pairs_are_a_permutation_of_at_least_half_the_largest_sum(count, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    gain = torch.rand(count, count, generator=generator)
    gain = (gain * 3).round() if ties else gain
    pairs = greedy_pairs(gain).tolist()
    assert sorted(pairs) == list(range(count))
    total = sum(float(gain[row, column]) for row, column in enumerate(pairs))
    best = max(
        sum(float(gain[row, column]) for row, column in enumerate(order))
        for order in itertools.permutations(range(count))
    )
    assert total >= best / 2 - 1e-6


# The pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    mixture_model("mixtral", vocab_size=VOCAB).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(book(60), encoding="utf-8")
    return folder


def run(folder, options, **settings):
    pipeline = go.Pipeline.parse(f"prune-experts{{{options},windows=3,seqlen=32}}")
    return pipeline.run(
        go.capture(str(folder)), go.RunOptions(calib=folder / "text.txt"), **settings
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", mostly_slow(["ratio=0.25", "experts=2,method=merge"], ("experts=2,method=merge",))
)
def test_what_was_done_is_in_the_report(folder, options):
    program, report = run(folder, options)
    (entry,) = report.passes
    details = entry.details
    assert program.config["num_local_experts"] == 6 and details["experts"] == [8, 6]
    assert (entry.matched, entry.changed, entry.verification) == (2, 2, "measured")
    for told in details["mixtures"]:
        order = sorted(range(8), key=lambda expert: told["saliency"][expert])
        assert told["kept"] == sorted(order[2:])
        assert sum(told["load"]) == pytest.approx(1)
        gone = [str(expert) for expert in sorted(order[:2])] if "merge" in options else []
        assert list(told["merged_into"]) == gone
    steps = [step["after"] for step in details["perplexity"]]
    merging = ["merging them"] if gone else []
    assert steps[: 2 + len(merging)] == ["the whole model", "dropping experts", *merging]
    if details["reconstructions"]:
        assert steps[-1] == "reconstruction"
    else:
        assert steps[-2:] == ["reconstruction", "leaving that out"]
    assert details["score"] == min(details["tried"], key=details["tried"].get)
    assert len(details["random"]) == 3
    counts = details["parameters"]
    assert f"parameters {counts[1] / counts[0] - 1:+.1%}" in entry.record.line()
    assert "6 of 8 experts are left" in entry.record.card()
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.slow
def test_random_experts_follow_the_seed_and_have_no_control(folder):
    _, report = run(folder, "ratio=0.5,score=random")
    details = report.passes[0].details
    assert details["random"] == [] and not report.passes[0].record.warnings()
    assert details["mixtures"][0]["kept"] != details["mixtures"][1]["kept"]
    _, again = run(folder, "ratio=0.5,score=random")
    assert again.passes[0].details["mixtures"] == details["mixtures"]


@pytest.mark.slow
def test_a_run_is_taken_up_behind_it(folder, tmp_path):
    first, _ = run(folder, "ratio=0.25,method=merge", work=tmp_path)
    pipeline = go.Pipeline.parse("prune-experts{ratio=0.25,method=merge,windows=3,seqlen=32}")
    options = go.RunOptions(calib=folder / "text.txt", resume=True)
    second, report = pipeline.run(go.capture(str(folder)), options, work=tmp_path)
    assert report.passes[0].resumed and isinstance(report.passes[0].record, PrunedExperts)
    ids = {"input_ids": _windows(1)}
    assert torch.equal(Runner(first).logits(ids), Runner(second).logits(ids))


def _record(values: list[float | None], random: list[float | None]) -> PrunedExperts:
    names = ["the whole model", "dropping experts", "merging them"]
    steps = [Step(after=name, value=value) for name, value in zip(names, values, strict=False)]
    mixture = PrunedMixture("layers.0", [0, 1], [1.0, 2.0, 0.0], [0.5, 0.5, 0.0], {}, {})
    return PrunedExperts(
        experts=(3, 2),
        mixtures=[mixture],
        score="reap",
        perplexity=steps,
        random=random,
        parameters=(300, 200),
    )


@pytest.mark.parametrize(
    ("values", "random", "said"),
    [
        ([10.0, 12.0], [11.0, 13.0, 14.0], []),
        ([10.0, 13.5], [11.0, 13.0, 14.0], ["NO BETTER THAN RANDOM"]),
        ([10.0, None], [11.0, 13.0, 14.0], ["NO BETTER THAN RANDOM"]),
        ([10.0, 12.0, 12.5], [13.0, 13.0, 14.0], ["MERGED IS WORSE"]),
        ([10.0, 12.0, None], [11.0, 11.0, 14.0], ["NO BETTER", "MERGED IS WORSE"]),
        ([10.0, 12.0, 11.5], [11.0, 11.0, 14.0], ["NO BETTER"]),
        ([10.0, 12.0, 11.0], [13.0, None, 14.0], []),
    ],
)
def test_what_does_not_help_is_said(values, random, said):
    record = _record(values, random)
    found = record.warnings()
    assert len(found) == len(said)
    for sentence, beginning in zip(found, said, strict=True):
        assert sentence.startswith(beginning)
        assert sentence in record.line()


# What is refused


@pytest.mark.parametrize("options", [{}, {"ratio": 0.25, "experts": 2}])
def test_one_of_ratio_and_experts(options):
    with pytest.raises(UsageError, match="takes one of ratio and experts"):
        make_pass("prune-experts", options)


def test_a_ratio_is_rounded_up_in_each_group():
    _, program = mixture("mixtral")
    (_, part), *_ = find_mixtures(program)
    left = {r: make_pass("prune-experts", {"ratio": r}).left(part) for r in (0.1, 0.25, 0.3)}
    assert left == {0.1: 7, 0.25: 6, 0.3: 5}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"experts": 7}, "7 of them cannot go: a token runs 2, so that 2 are left at least"),
        ({"ratio": 0.99}, "8 of them cannot go"),
    ],
)
def test_as_many_are_left_as_a_token_runs(options, reason):
    with pytest.raises(PassError, match=reason) as caught:
        make_pass("prune-experts", options).check(mixture("mixtral")[1])
    assert caught.value.remedy == "Lower ratio or experts."


@pytest.mark.slow
def test_groups_of_experts_stay_equal():
    program = mixture("deepseek_v3")[1]
    with pytest.raises(PassError, match="8 experts in 2 groups, which stay equal"):
        make_pass("prune-experts", {"experts": 3}).check(program)
    with pytest.raises(PassError, match="4 are left at least, in groups of 2"):
        make_pass("prune-experts", {"experts": 6}).check(program)
    make_pass("prune-experts", {"ratio": 0.5}).check(program)


def test_a_dense_model_is_refused():
    with pytest.raises(PassError, match="has no mixture of experts to prune"):
        make_pass("prune-experts", {"ratio": 0.5}).check(tiny_program())
