"""What users may get wrong with pictures: each ends in a sentence, by whichever command."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_folders import save_with_pictures
from tiny_models import save_tiny
from typer.testing import CliRunner

import graphopt as go
from graphopt.cli.commands import app
from graphopt.errors import GraphoptError, SourceError, UsageError
from graphopt.runtime.picture_prompts import open_picture
from graphopt.sources.windows import TokenText
from graphopt.vision.picture_rows import PictureRow, read_picture_rows
from graphopt.vision.picture_stream import calibration_rows, picture_stream

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = save_with_pictures(tmp_path_factory.mktemp("llava"), "llava")
    save_tiny(root / "words")
    (root / "text.png").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def program(folder):
    return go.capture(str(folder / "model"))


def refused(*args):
    """Return what a command that fails says, in one line."""
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert isinstance(done.exception, SystemExit) and done.exit_code in (1, 2), done.output
    return " ".join(done.output.split())


def rows_file(folder, tmp_path, **entries):
    """Return a folder of pictures with one row, of other entries than the first has."""
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    shutil.copy(folder / "text.png", images)
    row = json.loads((images / "rows.jsonl").read_text().split("\n")[0])
    (images / "rows.jsonl").write_text(json.dumps(row | entries))
    return images / "rows.jsonl"


def commands(folder, rows, tmp_path):
    """Return the commands that read rows: `eval`, and `compile` with what learns from them."""
    model = folder / "model"
    return [
        ("eval", model, "--pictures", rows),
        ("compile", model, "-o", tmp_path / "out", "--emit", "hf", "--calib-images", rows.parent,
         "--passes", "prune-blocks{blocks=1,windows=1,seqlen=16}"),
    ]  # fmt: skip


def often_not(*cases):
    return [pytest.param(*case, marks=pytest.mark.exhaustive) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"image": "text.png"}, r"text.png cannot be read as a picture: cannot identify"),
        *often_not(
            ({"prompt": "What is it?"}, "line 1: the prompt has 0 image tokens, and 1 pictures go"),
            ({"prompt": "<image> or <image>?"}, "line 1: the prompt has 2 image tokens, and 1 pic"),
            ({"answer": " an <image>"}, "The answer ' an <image>' has an image token"),
            ({"image": "gone.png"}, "line 1: there is no picture"),
            ({"image": 7}, "rows.jsonl, line 1"),
        ),
    ],
    ids=["no picture", "no token", "too many tokens", "token in answer", "gone", "number"],
)
def test_rows_that_cannot_be_used(tmp_path, folder, entries, message):
    rows = rows_file(folder, tmp_path, **entries)
    for command in commands(folder, rows, tmp_path):
        assert message in refused(*command)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pictures_for_a_model_of_text(tmp_path, folder):
    rows = folder / "images" / "rows.jsonl"
    commands_of_text = [
        [folder / "words" if part == folder / "model" else part for part in command]
        for command in commands(folder, rows, tmp_path)
    ]
    more = ("generate", folder / "words", "--prompt", "x", "--image", folder / "images" / "0.png")
    for command in (*commands_of_text, more):
        assert "is a model of text alone and takes no pictures" in refused(*command)


@pytest.mark.slow
def test_generating_from_what_is_no_picture(folder):
    asked = ("generate", folder / "model", "--prompt", "<image>?", "--image")
    assert "text.png cannot be read as a picture" in refused(*asked, folder / "text.png")
    assert "images is a folder. Give a regular file." in refused(*asked, folder / "images")
    said = refused(*asked, folder / "images" / "0.png", "--image", folder / "images" / "1.png")
    assert "the prompt has 1 image tokens, and 2 pictures go with it" in said


def test_a_text_with_ids_that_stand_for_pictures(folder, program):
    """A tokenizer may know an image token beyond the table's rows."""
    text = TokenText(torch.tensor([3, 4, 300]), torch.tensor([], dtype=torch.long))
    rows = calibration_rows(folder / "images")
    with pytest.raises(SourceError, match="gives the id 300, and the model knows 300 tokens"):
        picture_stream(program, rows, text, torch.device("cpu"))


def test_positions_that_windows_do_not_hold(folder, program, monkeypatch):
    """Positions that do not go on behind a picture are refused, not taken for others."""
    from graphopt.vision.tower import VisionTower

    original = VisionTower.inputs

    def inputs(self, **given):
        made = original(self, **given)
        return made | {"position_ids": made["position_ids"] * 2}

    monkeypatch.setattr(VisionTower, "inputs", inputs)
    with pytest.raises(UsageError, match=r"line 1: the model counts positions around pictures"):
        picture_stream(program, calibration_rows(folder / "images"), None, torch.device("cpu"))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (300, 2)])
@pytest.mark.parametrize("mode", ["RGB", "P", "LA", "I;16", "1", "CMYK"])
def test_pictures_of_odd_sizes_and_modes(tmp_path, size, mode):
    name = "a.jpg" if mode == "CMYK" else "a.png"
    Image.new("L", size, 100).convert(mode).save(tmp_path / name)
    picture = open_picture(tmp_path / name)
    assert picture.mode == "RGB" and picture.size == size


def test_formats_that_run_programs_are_not_read(tmp_path):
    """Pillow gives PostScript to an interpreter of it."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", "EPS")
    with pytest.raises(SourceError, match=r"a\.png cannot be read .* Give a PNG, JPEG"):
        open_picture(tmp_path / "a.png")


def encoded(kind):
    data = io.BytesIO()
    Image.linear_gradient("L").resize((30, 20)).convert("RGB").save(data, kind)
    return data.getvalue()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_damaged_pictures_end_in_a_sentence(tmp_path_factory, data):
    whole = bytearray(encoded(data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP"]))))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.png"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        assert open_picture(path).mode == "RGB"
    except GraphoptError as error:
        assert "a.png" in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=25, deadline=None)
@given(
    row=st.dictionaries(st.sampled_from(["image", "prompt", "answer", "other"]), JSON)
    | JSON
    | st.binary(max_size=20)
)
def test_rows_of_any_content_end_in_a_sentence(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(row if isinstance(row, bytes) else json.dumps(row).encode())
    try:
        assert all(isinstance(one, PictureRow) for one in read_picture_rows(path))
    except GraphoptError as error:
        assert "rows.jsonl" in str(error)
