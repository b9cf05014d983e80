"""prune-blocks: how many go, what the report holds, what is refused."""

from __future__ import annotations

import json

import pytest
from programs import tiny_program
from tiny_models import save_tiny

import graphopt as go
from graphopt.errors import GraphoptError, PassError
from graphopt.ir.blocks import find_blocks
from graphopt.passes.base import make_pass

TEXT = "the cat and the dog and the other animals of the house sat down to eat. " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return go.capture(str(save_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)))


def run(program, options, tmp_path, **arguments):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    pipeline = go.Pipeline.parse(f"prune-blocks{{{options},windows=2,seqlen=32}}")
    return pipeline.run(program, calib=text, **arguments)


@pytest.mark.parametrize(
    ("layers", "counts"), [(32, (7, 8, 10)), (36, (8, 9, 11)), (40, (8, 10, 12))]
)
def test_a_ratio_is_rounded_up_as_in_the_paper(layers, counts):
    program = tiny_program(layers=layers)
    found = tuple(
        make_pass("prune-blocks", {"ratio": ratio}).count(program) for ratio in (0.2, 0.25, 0.3)
    )
    assert found == counts


@pytest.mark.parametrize("score", ["mi", "bi", "angular", "kl", "ppl"])
def test_what_was_done_is_in_the_report(model, tmp_path, score):
    program, report = run(model, f"ratio=0.5,score={score}", tmp_path)
    (entry,) = report.passes
    details = entry.details
    assert len(find_blocks(program)) == 2 and program.config["num_hidden_layers"] == 2
    assert (entry.matched, entry.changed) == (4, 2) and entry.verification == "measured"
    assert details["removed"] == [f"model.layers.{index}" for index in details["order"]]
    assert [len(scores) for scores in details["scores"]] == [4, 3]
    first = details["scores"][0]
    assert min(first, key=first.get) == details["order"][0]
    assert len(details["perplexity"]) == 3 and len(details["tokens_per_second"]) == 2
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


def test_an_interrupted_recipe_knows_the_dense_model_when_it_goes_on(model, tmp_path):
    work = tmp_path / "work"
    run(model, "blocks=1", tmp_path, work=work)
    text = tmp_path / "text.txt"
    recipe = "prune-blocks{blocks=1,windows=2,seqlen=32},fuse-blocks{steps=2,batch=2,seqlen=32}"
    program, report = go.Pipeline.parse(recipe).run(model, calib=text, work=work, resume=True)
    assert [entry.resumed for entry in report.passes] == [True, False]
    assert len(find_blocks(program)) == 3
    straight, _ = go.Pipeline.parse(recipe).run(model, calib=text)
    for weight in straight.weights:
        assert weight.load().equal(program.weights[weight.name].load())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "was given none"),
        ({"ratio": 0.5, "blocks": 1}, "was given 2"),
        ({"ratio": 0.0}, "ratio of 0 of the blocks"),
        ({"ratio": 1.0}, "ratio of 1 of the blocks"),
        ({"ratio": -0.1}, r"ratio of -0\.1"),
        ({"blocks": 0}, "0 of 4 cannot be removed"),
        ({"blocks": 4}, "4 of 4 cannot be removed"),
        ({"remove": [1, 4]}, "no block 4: tiny has blocks 0 to 3"),
        ({"remove": [-1]}, "no block -1"),
        ({"remove": [1, 1]}, "names a block twice"),
        ({"remove": [1], "part": "any"}, "does not say which parts"),
        ({"blocks": 1, "score": "magic"}, "no score 'magic'"),
        ({"blocks": 1, "part": "norm"}, "no part 'norm'"),
        ({"blocks": 1, "reference": "other"}, "no reference 'other'"),
        ({"blocks": 1, "windows": 0}, "windows=0 is below 1"),
        ({"blocks": 1, "seqlen": 1}, "seqlen=1 is below 2"),
    ],
)
def test_wrong_options_are_refused_before_a_weight_is_read(options, message):
    with pytest.raises(PassError, match=message) as caught:
        make_pass("prune-blocks", options).check(tiny_program(layers=4))
    assert caught.value.remedy


def test_a_model_of_one_block_is_refused():
    with pytest.raises(PassError, match="has 1 blocks"):
        make_pass("prune-blocks", {"blocks": 1}).check(tiny_program(layers=1))


def test_a_text_that_is_too_short_is_refused_with_the_numbers(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    with pytest.raises(PassError, match="longer than the 128 that the model was made for"):
        go.Pipeline.parse("prune-blocks{blocks=1,seqlen=129}").run(model, calib=text)
    text.write_text("few words" * 14, encoding="utf-8")
    with pytest.raises(PassError, match="has 126 tokens, and a window takes 128") as caught:
        go.Pipeline.parse("prune-blocks{blocks=1,seqlen=128}").run(model, calib=text)
    assert caught.value.remedy


def test_a_model_without_tokenizer_cannot_read_a_text():
    with pytest.raises(GraphoptError, match="has no tokenizer"):
        go.Pipeline.parse("prune-blocks{blocks=1}").run(tiny_program(layers=3))
