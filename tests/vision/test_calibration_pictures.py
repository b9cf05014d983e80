"""Calibrating and training on pictures: as tokens of a stream, by passes as they are."""

from __future__ import annotations

import pytest
import torch
from picture_folders import MARKS, save_with_pictures
from sampling import slow_but
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner
from vision_models import QwenProcessor

import graphopt as go
import graphopt.vision.processor as processor_module
from graphopt.cli.commands import app
from graphopt.errors import PassError, SourceError, UsageError
from graphopt.execute.interpreter import Runner
from graphopt.execute.likelihoods import ProgramLikelihoods
from graphopt.ir.compare import first_difference
from graphopt.ir.picture_table import TABLE, with_picture_rows, without_picture_rows
from graphopt.ir.sighted import EMBEDS, sighted
from graphopt.ir.weights import Array
from graphopt.vision.picture_rows import PictureRow
from graphopt.vision.picture_stream import calibration_rows, picture_stream
from graphopt.vision.processor import Processor
from graphopt.vision.tower import VisionTower

pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each family a model with pictures beside it, and its program."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:

        def of(family):
            if family not in made:
                root = save_with_pictures(tmp_path_factory.mktemp(family), family)
                if family == "qwen2_vl":
                    load = processor_module.read_processor
                    patch.setattr(
                        processor_module, "read_processor",
                        lambda path: QwenProcessor() if path == root / "model" else load(path),
                    )  # fmt: skip
                made[family] = root, go.capture(str(root / "model"))
            return made[family]

        yield of


@pytest.fixture(scope="module")
def folder(folders):
    return folders("llava")[0]


@pytest.fixture(scope="module")
def program(folders):
    return folders("llava")[1]


def samples(folder, program):
    """Yield what the tower makes of every prompt with its answer."""
    processor, tower = Processor(program), VisionTower(program)
    for row in calibration_rows(folder / "images"):
        prompt = processor.inputs(row.prompt, row.images)
        yield tower.inputs(**processor.with_answer(prompt, row.answer)[0])


def stream_of(folder, program, text=None):
    rows = calibration_rows(folder / "images")
    return picture_stream(program, rows, text, torch.device("cpu"))


def close(found, want):
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("family", slow_but(MARKS, "llava"))
def test_ids_of_pictures_run_as_pictures(folders, family):
    """A program with rows for pictures gives the logits of the one that takes embeddings.

    Also for windows that begin within a text or a picture: only how far tokens stand apart counts.
    """
    folder, program = folders(family)
    stream = stream_of(folder, program)
    extended = with_picture_rows(program, stream.rows, stream.places)
    runner, seeing, begun = Runner(extended), Runner(sighted(program)), 0
    assert stream.pictures == 8 and (stream.places is None) == (family == "llava")
    for number, given in enumerate(samples(folder, program)):
        length = given["input_ids"].shape[1]
        ids = stream.text.ids[None, begun : begun + length]
        begun += length
        for start in range(0, length - 1, 3 if number == 2 else length):
            cut = {
                name: value[:, start:] if name == EMBEDS else value[..., start:]
                for name, value in given.items()
            }
            with torch.no_grad():
                close(runner.logits({"input_ids": ids[:, start:]}), seeing.logits(cut))
    assert begun == stream.tokens


def test_tokens_of_pictures_are_not_predicted(folder, program):
    stream, given = stream_of(folder, program), next(samples(folder, program))
    length = given["input_ids"].shape[1]
    ids = stream.text.windows(length)[:1]
    with torch.no_grad():
        want = Runner(sighted(program)).logits(given)
    likelihoods = ProgramLikelihoods(Runner(with_picture_rows(program, stream.rows)))
    losses, words = likelihoods.of(ids)[0], ids[0, 1:] < 300
    assert likelihoods.count_predicted(ids) == int(words.sum()) == length - 16
    rows = want[0, :-1].log_softmax(-1)
    known = rows[words].gather(-1, ids[0, 1:][words][:, None])[:, 0]
    torch.testing.assert_close(losses[words], known, rtol=1e-5, atol=1e-5)
    assert bool((losses[~words] == 0).all())


@pytest.mark.parametrize("recipe", ["", "canonicalise,fold-constants", "insert-kv-cache"])
@pytest.mark.parametrize("family", MARKS)
def test_what_pictures_need_is_taken_back(folders, family, recipe):
    folder, program = folders(family)
    program, _ = go.Pipeline.parse(recipe).run(program, go.RunOptions(verify=False))
    stream = stream_of(folder, program)
    extended = with_picture_rows(program, stream.rows, stream.places)
    assert first_difference(extended, program) is not None
    back = without_picture_rows(extended, program)
    assert first_difference(back, program) is None and str(back) == str(program)
    assert back.vision.tokens is None


def test_printed_form_with_pictures(folders):
    """Three axes are an input; masks are made where they are read, each with its window."""
    printed = {}
    for family in ("qwen2_vl", "gemma3"):
        folder, program = folders(family)
        stream = stream_of(folder, program)
        printed[family] = str(with_picture_rows(program, stream.rows, stream.places))
    assert "position_ids: i64[3,B,S])" in printed["qwen2_vl"]
    assert (
        "axial_rope_table(position_ids, rope.inv_freq, time=2, height=1, width=1)"
        in (printed["qwen2_vl"])
    )
    assert "pictures: i64[B,S])" in printed["gemma3"]
    assert "picture_mask(pictures, tokens, window=window)" in printed["gemma3"]
    assert (
        "block[window=8](scaled, cos_1, sin_1, attention_mask, pictures, input_ids)"
        in (printed["gemma3"])
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_pictures_behind_a_cache(folders, family):
    """A step on a cache sees the pictures before it as the whole text does."""
    folder, program = folders(family)
    stream = stream_of(folder, program)
    cached, _ = go.Pipeline.parse("insert-kv-cache").run(program, go.RunOptions(verify=False))
    runner = Runner(with_picture_rows(cached, stream.rows, stream.places))
    ids = stream.text.ids[None, :40]
    past = runner.empty_cache(1)
    with torch.no_grad():
        want = runner.logits({"input_ids": ids})
        # Cut behind a picture: what sees it whole is behind it.
        for start, stop in ((0, 34), (34, 35), (35, 40)):
            assert start == 0 or int(ids[0, start - 1]) < 300 or int(ids[0, start]) < 300
            values = runner.window_inputs(ids[:, :stop], start)
            for _, (made,) in runner.stream([values], [past]):
                logits = made.get(cached.outputs[0])
            close(logits, want[:, start:stop])


def test_text_and_pictures_alternate(folder, program):
    from graphopt.sources.windows import TokenText

    text = TokenText(torch.arange(3, 203), torch.tensor([], dtype=torch.long))
    stream = stream_of(folder, program, text)
    own = next(samples(folder, program))["input_ids"].shape[1]
    ids = stream.text.ids
    assert len(ids) == stream.tokens + 200
    assert torch.equal(ids[own : 2 * own], text.ids[:own])
    assert int((ids >= 300).sum()) == stream.rows.shape[0]
    assert "8 pictures (128 tokens)" in str(stream)


RECIPE = (
    "prune-blocks{ratio=0.34,windows=2,seqlen=32},fuse-blocks{steps=2,seqlen=16%s},"
    "carve-moe{shared=1,active=2,experts=4,windows=2,seqlen=32},"
    "flatquant{w=4,a=4,kv=%d,steps=2,seqlen=32}"
)

PRUNED, TRAINED = "prune-blocks{blocks=1,windows=2,seqlen=32}", "steps=2,seqlen=16,rate=1e-2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "text", "recipe"),
    [
        ("llava", False, RECIPE % ("", 16)),
        pytest.param("llava", True, RECIPE % ("", 16), marks=pytest.mark.exhaustive),
        ("qwen2_vl", True, RECIPE % (",generated_windows=2", 4)),
        ("gemma3", True, f"{PRUNED},fuse-blocks{{generated_windows=2,{TRAINED}}}"),
        pytest.param(
            "gemma3", True, RECIPE % (",generated_windows=2", 4), marks=pytest.mark.exhaustive
        ),
        ("llava", True, f"{PRUNED},fuse-blocks{{mode=published,group=2,batch=2,{TRAINED}}}"),
        pytest.param(
            "gemma3",
            True,
            f"{PRUNED},fuse-blocks{{mode=local,group=2,{TRAINED}}}",
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=[
        "pictures alone",
        "text and pictures",
        "three axes",
        "both ways",
        "both ways, all passes",
        "published",
        "local",
    ],
)
def test_passes_learn_from_pictures(tmp_path, folders, family, text, recipe):
    """Each is held to what it states, and the program that comes out has no more rows."""
    folder, _ = folders(family)
    options = go.CompileOptions(
        emit=("torch",), recipe=go.Pipeline.parse(recipe),
        calib_images=folder / "images", calib=folder / "text.txt" if text else None,
    )  # fmt: skip
    report = go.compile_model(str(folder / "model"), tmp_path / "out", options)
    assert report.calibration is not None and "8 pictures" in report.calibration.pictures
    assert "8 pictures" in (tmp_path / "out" / "report.html").read_text()
    assert all(entry.changed for entry in report.passes if not entry.exact)
    made = go.capture(str(tmp_path / "out"))
    assert TABLE not in made.weights and made.config["text_config"]["vocab_size"] == 300
    assert set(made.inputs) == {"input_ids", "attention_mask", "position_ids"}
    assert not any(node.op == "picture_mask" for f in made.functions.values() for node in f.nodes)


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
    assert "The calibration pictures and prompts have 226 tokens, and a window takes 250" in said
    assert "Give more pictures with --calib-images, or seqlen=226 or less" in said


def test_prompts_that_do_not_fit(folder, program):
    row = PictureRow((folder / "images" / "0.png",), "no token", " x", "rows.jsonl, line 1")
    with pytest.raises(UsageError, match=r"rows\.jsonl, line 1: the prompt has 0 image tokens"):
        picture_stream(program, [row], None, torch.device("cpu"))
