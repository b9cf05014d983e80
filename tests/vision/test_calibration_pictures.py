"""Calibrating and training on pictures: as tokens of a stream, by passes as they are."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner
from vision_models import save_llava_with_processor

import graphopt as go
from graphopt.cli.commands import app
from graphopt.errors import PassError, SourceError, UsageError
from graphopt.execute.interpreter import Runner
from graphopt.execute.likelihoods import ProgramLikelihoods
from graphopt.ir.picture_table import TABLE, with_picture_rows, without_picture_rows
from graphopt.ir.sighted import sighted
from graphopt.ir.weights import Array
from graphopt.vision.picture_rows import PictureRow
from graphopt.vision.picture_stream import (
    calibration_rows,
    check_pictures_as_tokens,
    picture_stream,
)
from graphopt.vision.processor import Processor
from graphopt.vision.tower import VisionTower

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a folder of six pictures with prompts and answers."""
    root = tmp_path_factory.mktemp("llava")
    save_llava_with_processor(root / "model")
    images = root / "images"
    images.mkdir()
    noise = torch.Generator().manual_seed(0)
    lines = []
    for number in range(6):
        values = torch.randint(0, 256, (20, 24, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(images / f"{number}.png")
        row = {
            "image": f"{number}.png",
            "prompt": "<image>What is it?",
            "answer": f" noise {number}",
        }
        lines.append(json.dumps(row))
    (images / "rows.jsonl").write_text("\n".join(lines))
    (root / "text.txt").write_text("The harbour was quiet on the morning the survey began. " * 40)
    return root


@pytest.fixture(scope="module")
def program(folder):
    return go.capture(str(folder / "model"))


def first_sample(folder, program):
    processor, row = Processor(program), calibration_rows(folder / "images")[0]
    inputs, _ = processor.with_answer(processor.inputs(row.prompt, row.images), row.answer)
    return inputs


def test_ids_of_pictures_run_as_pictures(folder, program):
    """A program with rows for pictures gives the logits of the one that takes embeddings."""
    cpu = torch.device("cpu")
    stream = picture_stream(program, calibration_rows(folder / "images"), None, cpu)
    given = first_sample(folder, program)
    length = given["input_ids"].shape[1]
    ids = stream.text.windows(length)[:1]
    with torch.no_grad():
        want = Runner(sighted(program)).logits(VisionTower(program).inputs(**given))
        extended = with_picture_rows(program, stream.rows)
        found = Runner(extended).logits({"input_ids": ids})
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert int((ids >= 300).sum()) == 16 and stream.pictures == 6
    assert stream.rows.shape == (6 * 16, 32)
    # What has no logit is not predicted, and does not count.
    likelihoods = ProgramLikelihoods(Runner(extended))
    losses, words = likelihoods.of(ids)[0], ids[0, 1:] < 300
    assert likelihoods.count_predicted(ids) == int(words.sum()) == length - 16
    rows = want[0, :-1].log_softmax(-1)
    known = rows[words].gather(-1, ids[0, 1:][words][:, None])[:, 0]
    torch.testing.assert_close(losses[words], known, rtol=1e-5, atol=1e-5)
    assert bool((losses[~words] == 0).all())


def test_text_and_pictures_alternate(folder, program):
    from graphopt.sources.windows import TokenText

    text = TokenText(torch.arange(3, 203), torch.tensor([], dtype=torch.long))
    rows = calibration_rows(folder / "images")
    stream = picture_stream(program, rows, text, torch.device("cpu"))
    own = first_sample(folder, program)["input_ids"].shape[1]
    ids = stream.text.ids
    assert len(ids) == stream.tokens + 200
    assert torch.equal(ids[own : 2 * own], text.ids[:own])
    assert int((ids >= 300).sum()) == stream.rows.shape[0]
    assert "6 pictures (96 tokens)" in str(stream)


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True], ids=["pictures alone", "text and pictures"])
def test_passes_learn_from_pictures(tmp_path, folder, text):
    """Each is held to what it states, and the program that comes out has no more rows."""
    recipe = (
        "prune-blocks{ratio=0.34,windows=2,seqlen=32},fuse-blocks{steps=2,seqlen=16},"
        "carve-moe{shared=1,active=2,experts=4,windows=2,seqlen=32},"
        "flatquant{w=4,a=4,kv=16,steps=2,seqlen=32}"
    )
    options = go.CompileOptions(
        emit=("torch",), recipe=go.Pipeline.parse(recipe),
        calib_images=folder / "images", calib=folder / "text.txt" if text else None,
    )  # fmt: skip
    report = go.compile_model(str(folder / "model"), tmp_path / "out", options)
    assert report.calibration is not None and "6 pictures" in report.calibration.pictures
    assert "6 pictures" in (tmp_path / "out" / "report.html").read_text()
    made = go.capture(str(tmp_path / "out"))
    assert TABLE not in made.weights and made.config["text_config"]["vocab_size"] == 300


@pytest.mark.slow
def test_what_is_learnt_hangs_on_the_pictures(tmp_path, folder):
    """And the result is a checkpoint that sees, with the table that it had."""
    recipe = go.Pipeline.parse(
        "prune-blocks{ratio=0.34,windows=2,seqlen=32},fuse-blocks{steps=3,seqlen=16}"
    )
    made = {}
    for name, images in (("text", None), ("both", folder / "images")):
        options = go.CompileOptions(
            emit=("hf",), recipe=recipe, verify=False, calib_images=images,
            calib=folder / "text.txt",
        )  # fmt: skip
        go.compile_model(str(folder / "model"), tmp_path / name, options)
        model, info = AutoModelForImageTextToText.from_pretrained(
            tmp_path / name / "hf", output_loading_info=True
        )
        assert not any(info.values()), info
        made[name] = model
    source = AutoModelForImageTextToText.from_pretrained(folder / "model")
    tables = [m.get_input_embeddings().weight for m in (source, made["text"], made["both"])]
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2])
    names = [n for n, _ in made["text"].named_parameters() if "mlp.down_proj" in n]
    assert any(
        not torch.equal(made["text"].get_parameter(n), made["both"].get_parameter(n)) for n in names
    )


def test_a_pass_that_changes_the_table(program):
    extended = with_picture_rows(program, Array(torch.zeros(4, 32)))
    weight = extended.weights[TABLE]
    extended.weights.replace(weight.with_producer(Array(weight.load() * 2)))
    with pytest.raises(PassError, match=r"changed 'model.language_model.embed_tokens.weight'"):
        without_picture_rows(extended, program)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "message"),
    [("qwen2_vl", "has positions of three axes"), ("gemma3", "see each other both ways")],
)
def test_pictures_that_are_more_than_vectors(vision_program, family, message):
    with pytest.raises(UsageError, match=f"{message}.*calibrated on text alone"):
        check_pictures_as_tokens(vision_program(family))


def test_folders_without_rows(tmp_path, folder):
    with pytest.raises(SourceError, match=r"is no folder"):
        calibration_rows(tmp_path / "none")
    with pytest.raises(SourceError, match=r"holds 0 \.jsonl files"):
        calibration_rows(tmp_path)


def test_too_few_pictures(tmp_path, folder):
    args = ["compile", str(folder / "model"), "-o", str(tmp_path / "out"), "--emit", "hf",
            "--calib-images", str(folder / "images"), "--no-verify",
            "--passes", "prune-blocks{ratio=0.34,seqlen=250}"]  # fmt: skip
    result = CliRunner().invoke(app, args)
    said = " ".join(result.output.split())
    assert result.exit_code == 1
    assert "The calibration pictures and prompts have 210 tokens, and a window takes 250" in said
    assert "Give more pictures with --calib-images, or seqlen=210 or less" in said


def test_prompts_that_do_not_fit(folder, program):
    row = PictureRow((folder / "images" / "0.png",), "no token", " x", "rows.jsonl, line 1")
    with pytest.raises(UsageError, match=r"rows\.jsonl, line 1: the prompt has 0 image tokens"):
        picture_stream(program, [row], None, torch.device("cpu"))
