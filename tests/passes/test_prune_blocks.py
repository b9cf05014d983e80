"""prune-blocks: how many go, what the report holds, what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from programs import tiny_program
from tiny_models import save_tiny

import graphopt as go
from graphopt.calibration.scores import METRICS, PruningUnit
from graphopt.calibration.text import PERPLEXITY_WINDOWS, held_out_perplexity, text_windows
from graphopt.errors import GraphoptError, PassError, UsageError
from graphopt.evaluate.perplexity import read_text
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import find_blocks, remove_blocks
from graphopt.pass_manager.contract import make_pass
from graphopt.pass_manager.options import option_types
from graphopt.passes.prune_blocks import chooser
from graphopt.passes.prune_blocks.prune_blocks import PruneBlocks

TEXT = "the cat and the dog and the other animals of the house sat down to eat. " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return go.capture(str(save_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)))


def run(program, options, tmp_path, work=None):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    pipeline = go.Pipeline.parse(f"prune-blocks{{{options},windows=2,seqlen=32}}")
    return pipeline.run(program, go.RunOptions(calib=text), work=work)


@pytest.mark.parametrize(
    ("layers", "counts"), [(32, (7, 8, 10)), (36, (8, 9, 11)), (40, (8, 10, 12))]
)
def test_a_ratio_is_rounded_up_as_in_the_paper(layers, counts):
    program = tiny_program(layers=layers)
    found = tuple(
        make_pass("prune-blocks", {"ratio": ratio}).count(program) for ratio in (0.2, 0.25, 0.3)
    )
    assert found == counts


@pytest.mark.slow
@pytest.mark.parametrize("score", ["mi", "bi", "angular", "kl", "ppl"])
def test_what_was_done_is_in_the_report(model, tmp_path, score):
    program, report = run(model, f"ratio=0.5,score={score},look_back=false", tmp_path)
    (entry,) = report.passes
    details = entry.details
    assert len(find_blocks(program)) == 2 and program.config["num_hidden_layers"] == 2
    assert (entry.matched, entry.changed) == (4, 2) and entry.verification == "measured"
    assert details["removed"] == [f"model.layers.{index}" for index in details["order"]]
    assert [len(scores) for scores in details["scores"]] == [4, 3]
    first = details["scores"][0]
    assert min(first, key=first.get) == details["order"][0]
    assert len(details["perplexity"]) == 3 and len(details["tokens_per_second"]) == 2
    counts = details["parameters"]
    assert counts == [model.parameter_count(), program.parameter_count()]
    assert f"parameters {counts[1] / counts[0] - 1:+.1%}" in entry.record.line()
    json.dumps(report.to_json(), allow_nan=False)


def test_without_iteration_one_round_of_scores_decides(model, tmp_path):
    _, report = run(model, "blocks=2,iterative=false", tmp_path)
    details = report.passes[0].details
    (scores,) = details["scores"]
    assert details["order"] == sorted(scores, key=scores.get)[:2]


def test_a_list_says_which(model, tmp_path):
    program, report = run(model, "remove=[3,0]", tmp_path)
    assert report.passes[0].details["order"] == ["3", "0"]
    kept = [program.calls[block.position].path for block in find_blocks(program)]
    assert kept == ["model.layers.1", "model.layers.2"]


@pytest.mark.parametrize("part", ["attention", "ffn", "any"])
def test_parts_are_scored_and_removed_apart(model, tmp_path, part):
    program, report = run(model, f"blocks=2,part={part}", tmp_path)
    order = report.passes[0].details["order"]
    assert all(part in ("any", unit.split(".")[1]) for unit in order)
    assert report.passes[0].parameters_after < model.parameter_count()
    assert program.parameter_count() == report.passes[0].parameters_after


@pytest.mark.slow
def test_by_default_windows_are_no_longer_than_the_model_takes(model):
    assert model.config["max_position_embeddings"] == 128
    _, report = go.Pipeline.parse("prune-blocks{blocks=1}").run(model)
    assert len(report.passes[0].details["scores"]) == 1


def test_the_figures_are_those_of_the_models_without_what_was_removed(model, tmp_path):
    _, report = run(model, "blocks=3,look_back=false", tmp_path)
    details = report.passes[0].details
    order = [int(index) for index in details["order"]]
    checked = text_windows(model, read_text(tmp_path / "text.txt"), 32)[-PERPLEXITY_WINDOWS:]
    for done, entry in enumerate(details["perplexity"]):
        pruned = model.copy()
        remove_blocks(pruned, order[:done])
        expected = held_out_perplexity(pruned, checked, torch.device("cpu"), torch.float32)
        assert entry["value"] == pytest.approx(expected, rel=1e-6)
    for round_, scores in enumerate(details["scores"]):
        assert set(scores) == {str(i) for i in range(4)} - set(details["order"][:round_])


def test_a_score_that_is_no_number_is_null_in_the_report_and_never_chosen(
    model, tmp_path, monkeypatch
):
    real = chooser.score_removals

    def scores(program, removals, *arguments, **options):
        found = real(program, removals, *arguments, **options)
        return {
            removal: math.nan if PruningUnit(1) in removal else score
            for removal, score in found.items()
        }

    monkeypatch.setattr(chooser, "score_removals", scores)
    _, report = run(model, "blocks=2,iterative=false", tmp_path)
    details = report.passes[0].details
    assert details["scores"][0]["1"] is None and "1" not in details["order"]
    json.dumps(report.to_json(), allow_nan=False)


def test_a_shortened_model_writes_the_same_with_and_without_a_cache(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    recipe = "prune-blocks{blocks=2,windows=2,seqlen=32},insert-kv-cache"
    program, _ = go.Pipeline.parse(recipe).run(model, go.RunOptions(calib=text))
    assert list(program.states) == ["kv.0", "kv.1"]
    runner = Runner(program)
    ids = torch.randint(0, 250, (2, 6), generator=torch.Generator().manual_seed(0))
    cached, (step, cache) = ids, runner.run({"input_ids": ids})
    for _ in range(8):
        token = step[0][:, -1:].argmax(-1)
        cached = torch.cat((cached, token), 1)
        step, cache = runner.run({"input_ids": token}, cache)
    for _ in range(8):
        ids = torch.cat((ids, runner.logits({"input_ids": ids})[:, -1:].argmax(-1)), 1)
    assert cached.equal(ids)


@pytest.mark.slow
def test_an_interrupted_recipe_knows_the_dense_model_when_it_goes_on(model, tmp_path):
    work = tmp_path / "work"
    run(model, "blocks=1", tmp_path, work=work)
    text = tmp_path / "text.txt"
    recipe = "prune-blocks{blocks=1,windows=2,seqlen=32},fuse-blocks{steps=2,batch=2,seqlen=32}"
    program, report = go.Pipeline.parse(recipe).run(
        model, go.RunOptions(calib=text, resume=True), work=work
    )
    assert [entry.resumed for entry in report.passes] == [True, False]
    assert len(find_blocks(program)) == 3
    straight, _ = go.Pipeline.parse(recipe).run(model, go.RunOptions(calib=text))
    for weight in straight.weights:
        assert weight.load().equal(program.weights[weight.name].load())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "was given none"),
        ({"ratio": 0.5, "blocks": 1}, "was given 2"),
        ({"ratio": 0.0}, r"ratio=0\.0 is not above 0"),
        ({"ratio": 1.0}, r"ratio=1\.0 is not below 1"),
        ({"ratio": -0.1}, r"ratio=-0\.1 is not above 0"),
        ({"blocks": 0}, "blocks=0 is below 1"),
        ({"remove": [-1]}, "remove=-1 is below 0"),
        ({"remove": [1, 1]}, "names a block twice"),
        ({"remove": [1], "part": "any"}, "does not say which parts"),
        ({"blocks": 1, "score": "magic"}, "no score 'magic'"),
        ({"blocks": 1, "part": "norm"}, "no part 'norm'"),
        ({"blocks": 1, "reference": "other"}, "no reference 'other'"),
        ({"blocks": 1, "windows": 0}, "windows=0 is below 1"),
        ({"blocks": 1, "seqlen": 1}, "seqlen=1 is below 2"),
    ],
)
def test_a_pass_with_wrong_options_cannot_be_made(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_pass("prune-blocks", options)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 4}, "4 of 4 cannot be removed"),
        ({"remove": [1, 4]}, "no block 4: tiny has blocks 0 to 3"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_a_weight_is_read(options, message):
    with pytest.raises(PassError, match=message) as caught:
        make_pass("prune-blocks", options).check(tiny_program(layers=4))
    assert caught.value.remedy


def test_every_score_can_be_chosen():
    assert set(option_types(PruneBlocks)["score"].choices) == set(METRICS)


def hiding_parts(program, index):
    """Return the program with a norm behind the sum of one block."""
    call = program.calls[find_blocks(program)[index].position]
    function = program.functions[call.function].clone("normed")
    program.functions["normed"], call.function = function, "normed"
    function.results = [function.add("rms_norm", function.results, {"eps": 1e-6}).output]
    return program


def test_a_part_that_a_listed_block_does_not_have_is_refused_with_its_place():
    program = hiding_parts(tiny_program(layers=4), 2)
    make_pass("prune-blocks", {"remove": [1], "part": "ffn"}).check(program)
    with pytest.raises(PassError, match=r"layers\.2 \(block 2\) has no ffn to remove") as caught:
        make_pass("prune-blocks", {"remove": [1, 2], "part": "ffn"}).check(program)
    assert "part=block" in caught.value.remedy


def test_a_model_whose_blocks_are_no_sums_has_no_parts():
    program = hiding_parts(hiding_parts(tiny_program(layers=2), 0), 1)
    with pytest.raises(PassError, match="No block of tiny is a sum") as caught:
        make_pass("prune-blocks", {"blocks": 1, "part": "any"}).check(program)
    assert "part=block" in caught.value.remedy


def test_a_result_that_is_read_twice_is_refused_with_its_place():
    program = tiny_program(layers=4)
    program.outputs.append(program.calls[find_blocks(program)[3].position].results[0])
    with pytest.raises(PassError, match=r"the result of layers\.3 is read by later blocks too"):
        make_pass("prune-blocks", {"blocks": 1}).check(program)


@pytest.mark.parametrize(
    ("options", "count"), [({"ratio": 0.99}, 4), ({"remove": [0, 1, 2, 3]}, 4)]
)
def test_not_everything_can_go(options, count):
    with pytest.raises(PassError, match=f"{count} of 4 cannot be removed") as caught:
        make_pass("prune-blocks", options).check(tiny_program(layers=4))
    assert caught.value.remedy == "Remove 1 to 3."


def test_a_model_of_one_block_is_refused():
    with pytest.raises(PassError, match="two blocks or more, and tiny has 1"):
        make_pass("prune-blocks", {"blocks": 1}).check(tiny_program(layers=1))


def test_a_text_that_is_too_short_is_refused_with_the_numbers(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    with pytest.raises(PassError, match="longer than the 128 that the model was made for"):
        go.Pipeline.parse("prune-blocks{blocks=1,seqlen=129}").run(model, go.RunOptions(calib=text))
    text.write_text("few words" * 14, encoding="utf-8")
    with pytest.raises(PassError, match="has 126 tokens, and a window takes 128") as caught:
        go.Pipeline.parse("prune-blocks{blocks=1,seqlen=128}").run(model, go.RunOptions(calib=text))
    assert caught.value.remedy


@pytest.mark.slow
def test_without_a_text_the_model_writes_what_is_scored(model):
    _, report = go.Pipeline.parse("prune-blocks{blocks=1,seqlen=64}").run(model)
    (details,) = [entry.details for entry in report.passes]
    assert all(score is not None for score in details["scores"][0].values())


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "memory of cpu"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory of this machine"),
    ],
)
def test_memory_that_does_not_suffice_is_said_with_what_lowers_it(
    model, tmp_path, monkeypatch, error, where
):

    def full(*args, **options):
        raise error

    monkeypatch.setattr(chooser, "score_removals", full)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    with pytest.raises(PassError, match=f"Scoring blocks does not fit the {where}") as caught:
        go.Pipeline.parse("prune-blocks{blocks=1,seqlen=64}").run(model, go.RunOptions(calib=text))
    assert "Lower windows or seqlen" in caught.value.remedy


def test_a_model_without_tokenizer_cannot_read_a_text():
    with pytest.raises(GraphoptError, match="has no tokenizer"):
        go.Pipeline.parse("prune-blocks{blocks=1}").run(tiny_program(layers=3))
