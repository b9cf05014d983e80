"""What models say of generation: read, kept, and written for every runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_models
import torch
from tiny_models import byte_tokenizer, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.errors import SourceError
from graphopt.execute.language_model import ProgramModel
from graphopt.generate import end_tokens, generate_ids
from graphopt.ir.serialize import program_from_json, program_to_json
from graphopt.sources.generation import (
    GENERATION_NAME,
    GenerationSettings,
    not_applied,
    read_generation,
)

pytestmark = pytest.mark.oldest

DRAWN = {
    "eos_token_id": [258, 7], "bos_token_id": 5, "pad_token_id": 9, "do_sample": True,
    "temperature": 0.7, "top_k": 30, "top_p": 0.8, "repetition_penalty": 1.05,
}  # fmt: skip


def small_gguf(path: Path, monkeypatch: pytest.MonkeyPatch, add: Any) -> Path:
    """Write a small Llama as GGUF, with what `add` writes as its tokenizer."""
    monkeypatch.setattr(tiny_models, "add_tokenizer", add)
    architecture, entries = tiny_models.GGUF_ARCHITECTURES["llama"]
    model = tiny_model("llama", **entries)
    return tiny_models.write_gguf(path, model, architecture, tokenizer=True)


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / GENERATION_NAME).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "ends", "pad"),
    [
        ({}, {}, (), None),
        ({"eos_token_id": 2}, {}, (2,), None),
        ({"eos_token_id": [2, 3], "pad_token_id": 0}, {}, (2, 3), 0),
        ({"eos_token_id": 2, "pad_token_id": 0}, {"eos_token_id": [4, 5, 4]}, (4, 5), 0),
        ({"eos_token_id": 2, "pad_token_id": 0}, {"pad_token_id": 6}, (2,), 6),
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,), None),
        ({"eos_token_id": -1, "pad_token_id": -1}, {}, (), None),
        ({"text_config": {"eos_token_id": 8, "pad_token_id": 1}}, {}, (8,), 1),
        ({"text_config": {"eos_token_id": 8}, "eos_token_id": 2}, {}, (2,), None),
    ],
)
def test_the_generation_config_comes_before_the_config(
    config: dict[str, Any], generation: dict[str, Any], ends: tuple[int, ...], pad: int | None
) -> None:
    settings = GenerationSettings.of(config, generation)
    assert (settings.eos_token_id, settings.pad_token_id) == (ends, pad)


def test_values_that_are_not_stated_are_those_of_transformers() -> None:
    theirs = GenerationConfig._get_default_generation_params()
    ours = GenerationSettings().model_dump()
    shared = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "it should be an object"),
        ({"eos_token_id": "2"}, "'eos_token_id.0' is '2'"),
        ({"eos_token_id": [1, None]}, "'eos_token_id.1' is None"),
        ({"eos_token_id": True}, "'eos_token_id.0' is True"),
        ({"eos_token_id": list(range(2000))}, "eos_token_id"),
        ({"pad_token_id": 2**70}, "pad_token_id"),
        ({"temperature": -1}, "'temperature' is -1"),
        ({"temperature": "hot"}, "'temperature' is 'hot'"),
        ({"top_p": 1.5}, "'top_p' is 1.5"),
        ({"top_k": 2.5}, "'top_k' is 2.5"),
        ({"repetition_penalty": 0}, "'repetition_penalty' is 0"),
        ({"do_sample": 1}, "'do_sample' is 1"),
    ],
)
def test_entries_that_make_no_sense_are_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"{GENERATION_NAME}.*{message}"):
        read_generation(write(tmp_path, content))


def test_old_checkpoints_say_it_in_config_json(tmp_path: Path) -> None:
    config = {"hidden_size": 4, "do_sample": True, "temperature": 0.5, "top_k": None}
    assert read_generation(tmp_path, config) == {"do_sample": True, "temperature": 0.5}
    # A generation config stands for itself.
    assert read_generation(write(tmp_path, {"top_k": 3}), config) == {"top_k": 3}
    with pytest.raises(SourceError, match=r"config\.json.*'temperature'"):
        read_generation(tmp_path / "nothing", {"temperature": "x"})


def test_what_is_not_applied_is_named() -> None:
    stated = {
        **DRAWN, "typical_p": 0.9, "suppress_tokens": [3], "no_repeat_ngram_size": 2,
        "num_beams": 1, "bad_words_ids": None, "use_cache": True, "max_length": 20, "guess": 1,
        "transformers_version": "5", "_from_model_config": True, "renormalize_logits": False,
    }  # fmt: skip
    named = ["guess", "no_repeat_ngram_size", "suppress_tokens", "typical_p"]
    assert not_applied(stated) == named


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that ends by the token that greedy decoding gives fourth, besides config.json's."""
    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny", eos_token_id=258, head_dim=16)
    model: Any = tiny_model(head_dim=16)
    ids = torch.tensor([byte_tokenizer()("hello")["input_ids"]])
    free = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=299)
    second = int(free[0, ids.shape[1] + 3])
    return write(folder, {"eos_token_id": [258, second], "pad_token_id": 0})


@pytest.mark.slow
def test_all_end_tokens_end_a_text_in_every_form(folder: Path, tmp_path: Path) -> None:
    """Case 06 of issue 14, through passes, emitters and folders that are opened again."""
    ids = byte_tokenizer()("hello")["input_ids"]
    reference: Any = AutoModelForCausalLM.from_pretrained(folder)
    made = reference.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    *expected, second = made[0, len(ids) :].tolist()
    assert len(expected) < 4

    out = tmp_path / "out"
    program, report = go.Pipeline.default().run(
        go.capture(str(folder)), go.RunOptions(verify=False)
    )
    go.emit(program, out, emit=("onnx", "torch", "hf"), report=report)
    genai = json.loads((out / "onnx" / "genai_config.json").read_text())
    assert genai["model"]["eos_token_id"] == [258, second]
    assert genai["model"]["pad_token_id"] == 0
    assert f"END: list[int] = [258, {second}]" in (out / "model.py").read_text()
    assert GenerationConfig.from_pretrained(out / "hf").eos_token_id == [258, second]

    for spec, backend in (
        (folder, "program"), (out, "program"), (out, "torch"), (out, "onnx"),
        (out / "onnx", "onnx"), (out / "hf", "program"),
    ):  # fmt: skip
        model = open_language_model(str(spec), backend)  # type: ignore[arg-type]
        ends = end_tokens(model, byte_tokenizer())
        assert ends == {258, second}
        assert list(generate_ids(model, ids, stop=ends, max_new_tokens=12)) == expected


@pytest.mark.slow
def test_a_program_keeps_it(folder: Path, tmp_path: Path) -> None:
    program = go.capture(str(folder))
    program.generation = dict(DRAWN)
    assert program.copy().generation == DRAWN
    saved = json.loads(json.dumps(program_to_json(program)))
    assert program_from_json(saved, {}).generation == DRAWN
    del saved["generation"]  # as older versions saved it
    assert program_from_json(saved, {}).generation == {}

    out = tmp_path / "out"
    go.emit(program, out, emit=("hf",))
    assert json.loads((out / "hf" / GENERATION_NAME).read_text()) == DRAWN
    assert ProgramModel(go.capture(str(out))).settings.top_k == 30


@pytest.mark.slow
def test_sampling_defaults_reach_onnxruntime_genai(folder: Path, tmp_path: Path) -> None:
    program = go.Pipeline.default().run(go.capture(str(folder)), go.RunOptions(verify=False))[0]
    for stated, expected in (
        (DRAWN, (True, 0.7, 30, 0.8, 1.05)),
        ({**DRAWN, "do_sample": False}, (False, 0.7, 30, 0.8, 1.05)),
        ({"do_sample": True}, (True, 1.0, 50, 1.0, 1.0)),
        ({"do_sample": True, "temperature": 0.0}, (False, 1.0, 50, 1.0, 1.0)),
        ({}, (False, 1.0, 50, 1.0, 1.0)),
    ):
        program.generation = dict(stated)
        go.emit(program, tmp_path / "out", emit=("onnx",), force=True)
        config = json.loads((tmp_path / "out" / "onnx" / "genai_config.json").read_text())
        names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        assert tuple(config["search"][name] for name in names) == expected
        model = config["model"]
        wanted = ([258, 7], 5, 9) if "pad_token_id" in stated else (258, 1, 258)
        assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, {"eos_token_id": [258]}),
        ({"tokenizer.ggml.eot_token_id": 6, "tokenizer.ggml.eom_token_id": 7},
         {"eos_token_id": [258, 6, 7]}),
        ({"tokenizer.ggml.eot_token_id": 258, "tokenizer.ggml.padding_token_id": 3},
         {"eos_token_id": [258], "pad_token_id": 3}),
        ({"general.sampling.temp": 0.5, "general.sampling.top_k": 20},
         {"eos_token_id": [258], "do_sample": True, "temperature": 0.5, "top_k": 20}),
        ({"general.sampling.temp": 0.0, "general.sampling.penalty_repeat": 1.5},
         {"eos_token_id": [258], "do_sample": False, "temperature": 0.0,
          "repetition_penalty": 1.5}),
    ],
)  # fmt: skip
def test_gguf_files_say_it_in_their_metadata(
    entries: dict[str, Any],
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = tiny_models.add_tokenizer

    def with_entries(writer: gguf.GGUFWriter) -> None:
        add(writer)
        for key, value in entries.items():
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)

    path = small_gguf(tmp_path / "model.gguf", monkeypatch, with_entries)
    assert go.capture(str(path)).generation == expected


def test_gguf_values_out_of_range_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = tiny_models.add_tokenizer

    def wrong(writer: gguf.GGUFWriter) -> None:
        add(writer)
        writer.add_string("general.sampling.top_k", "many")

    path = small_gguf(tmp_path / "model.gguf", monkeypatch, wrong)
    with pytest.raises(SourceError, match=r"model\.gguf.*'top_k' is 'many'"):
        go.capture(str(path))
