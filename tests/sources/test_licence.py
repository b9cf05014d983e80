"""What a source states of its licence, and the files of it, go along with what is made of it."""

from __future__ import annotations

import json

import gguf
import pytest
from sampling import slow_but
from tiny_models import save_tiny, tiny_model, write_gguf

import graphopt as go
from graphopt.capture import capture
from graphopt.errors import SourceError
from graphopt.files.licence import licence_files
from graphopt.pass_manager.pipeline import Pipeline
from graphopt.sources.huggingface import DOWNLOAD_PATTERNS
from graphopt.sources.licence import gguf_licence, stated_licence

CARD = """---
license: other
license_name: "a name"
license_link: https://example.org/terms
tags: [x]
---

# A model

license: not this one
"""


@pytest.fixture(scope="module")
def licensed(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("models") / "licensed")
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "NOTICE.txt").write_text("Made by us.\n")
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.mark.parametrize("form", slow_but(["torch", "hf", "onnx"], "onnx"))
def test_every_form_has_the_files(licensed, tmp_path, form):
    program = capture(str(licensed))
    program, _ = Pipeline.default().run(program)
    report = go.emit(program, tmp_path / "out", emit=(form,))
    folders = [tmp_path / "out"] + ([] if form == "torch" else [tmp_path / "out" / form])
    for folder in folders:
        assert (folder / "LICENSE").read_text() == "Do as you like.\n"
        assert (folder / "NOTICE.txt").read_text() == "Made by us.\n"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["licence"] == report.licence == "other, a name, https://example.org/terms"
    assert "LICENSE" in manifest["files"]
    assert report.licence_files == ["LICENSE", "NOTICE.txt"]
    # An output folder is a source like any other.
    again = capture(str(tmp_path / "out"))
    assert again.licence == report.licence
    go.emit(again, tmp_path / "again", emit=(form,))
    assert (tmp_path / "again" / "NOTICE.txt").read_text() == "Made by us.\n"


def test_what_a_gguf_file_states_becomes_a_notice(tmp_path):
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_model(), gguf.MODEL_ARCH.LLAMA, tokenizer=True,
        entries={"general.license": "gemma", "general.license.link": "https://example.org/g"},
    )  # fmt: skip
    program = capture(str(path))
    assert program.licence == "gemma, https://example.org/g"
    report = go.emit(program, tmp_path / "out", emit=("torch",))
    notice = (tmp_path / "out" / "NOTICE").read_text()
    assert "from tiny" in notice and "licence: gemma, https://example.org/g\n" in notice
    page = (tmp_path / "out" / "report.html").read_text()
    assert "gemma, https://example.org/g" in page and report.licence_files == []


def test_a_source_that_states_nothing_gets_no_notice(tmp_path):
    folder = save_tiny(tmp_path / "bare")
    assert stated_licence(folder) == "" and licence_files(folder) == []
    go.emit(capture(str(folder)), tmp_path / "out", emit=("torch",))
    assert not (tmp_path / "out" / "NOTICE").exists()
    assert "the source states none" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("card", "stated"),
    [
        (CARD, "other, a name, https://example.org/terms"),
        ("---\nlicense: mit\n---\n", "mit"),
        ("# license: mit\n", ""),
        ("---\nlicense:\n- mit\n---\n", ""),
        ("---\nlicense: a\x1b[31mb\n---\n", r"a\x1b[31mb"),
    ],
)
def test_the_header_of_a_model_card(tmp_path, card, stated):
    (tmp_path / "README.md").write_text(card)
    assert stated_licence(tmp_path) == stated


def test_metadata_that_is_no_text_states_nothing():
    assert gguf_licence({"general.license": 3, "general.license.name": "a\nb"}) == r"a\nb"
    assert gguf_licence({"general.license": "\udcff"}) == "?"


def test_a_licence_that_leads_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="outside the folder"):
        licence_files(folder)


def test_a_licence_that_is_none_is_refused_when_the_folder_is_opened(tmp_path):
    (tmp_path / "LICENSE").write_bytes(b"x" * (1 << 20))
    assert len(licence_files(tmp_path)) == 1
    (tmp_path / "LICENSE").write_bytes(b"x" * (1 << 20 | 1))
    with pytest.raises(SourceError, match="at most"):
        licence_files(tmp_path)


def test_licences_are_fetched_from_the_hub():
    assert {"LICENSE*", "NOTICE*", "README.md"} <= set(DOWNLOAD_PATTERNS)
