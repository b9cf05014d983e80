"""What leaves: every runtime puts the right tokens before a prompt, and ends where it should."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from programs import tiny_program
from tiny_models import byte_tokenizer, save_tiny
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.generate import encode_prompt, end_tokens, generate, generate_ids
from graphopt.ir.graph import Program
from graphopt.lowering.tokenizer import copy_tokenizer, write_tokenizer
from graphopt.sources.tokenizer import read_tokenizer
from graphopt.sources.windows import prompt_ids

TURNS = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<model>"
PLAIN = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def llama() -> LlamaTokenizer:
    """A tokenizer of one of transformers' own classes, which makes its post-processor of flags."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *"the quickbrown", "▁t", "▁th", "▁the"]
    return LlamaTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=[("▁", "t"), ("▁t", "h"), ("▁th", "e")],
        add_bos_token=True,
        add_eos_token=True,
    )


def program_with(folder: Path, **options: Any) -> Program:
    program = tiny_program(vocab=300, cache=True, head_dim=32, **options)
    program.tokenizer = str(folder)
    program.config = {"vocab_size": 300, "hidden_size": 32, "max_position_embeddings": 256}
    return program


def changed(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / name).read_text(encoding="utf-8"))
    change(data)
    (folder / name).write_text(json.dumps(data), encoding="utf-8")


def without_post_processor(folder: Path) -> None:
    """As files of models whose class adds the first token by itself."""
    changed(folder, "tokenizer.json", lambda data: data.update(post_processor=None))


def padded_and_cut(folder: Path) -> None:
    """As files that were saved by a program that trained with them."""

    def change(data: dict[str, Any]) -> None:
        data["truncation"] = {
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip
        data["padding"] = {
            "strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
        }  # fmt: skip

    changed(folder, "tokenizer.json", change)


@pytest.mark.parametrize(
    ("make", "spoil", "begin"),
    [
        (byte_tokenizer, None, 0),
        (lambda: byte_tokenizer(begin=["<s>"]), None, 1),
        (lambda: byte_tokenizer(begin=["<a>", "<b>"], end=["<c>"]), None, 2),
        (lambda: byte_tokenizer(begin=["<s>"]), padded_and_cut, 1),
        (llama, None, 1),
        (llama, without_post_processor, None),
    ],
)
def test_tokenizer_json_says_what_transformers_does_with_a_prompt(
    make: Callable[[], Any],
    spoil: Callable[[Path], None] | None,
    begin: int | None,
    tmp_path: Path,
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    make().save_pretrained(source)
    out.mkdir()
    if spoil is not None:
        spoil(source)
    theirs = AutoTokenizer.from_pretrained(source)
    files, notes = write_tokenizer(program_with(source), out)
    assert not notes and out / "tokenizer.json" in files
    for text in ("the quick", "the", "brown the the quick " * 20):
        ids = Tokenizer.from_file(str(out / "tokenizer.json")).encode(text).ids
        assert ids == prompt_ids(theirs, text)
        if begin is not None:
            plain = theirs(text, add_special_tokens=False, truncation=False)["input_ids"]
            assert len(ids) == begin + len(plain)
    # What transformers reads again is the same for a prompt, and copies are as they were.
    again = AutoTokenizer.from_pretrained(out)
    assert prompt_ids(again, "the quick") == prompt_ids(theirs, "the quick")
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in copy_tokenizer(program_with(source), copied):
        assert path.read_bytes() == (source / path.name).read_bytes()


def test_a_chat_template_gets_a_file_of_its_own(tmp_path: Path) -> None:
    """Old files keep it in tokenizer_config.json."""
    source, out = tmp_path / "source", tmp_path / "out"
    byte_tokenizer().save_pretrained(source)
    changed(source, "tokenizer_config.json", lambda data: data.update(chat_template=PLAIN))
    out.mkdir()
    files, _ = write_tokenizer(program_with(source), out)
    assert out / "chat_template.jinja" in files
    assert (out / "chat_template.jinja").read_text() == PLAIN


def test_files_that_cannot_be_read_are_copied_and_noted(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    byte_tokenizer().save_pretrained(source)
    (source / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    out.mkdir()
    files, ((where, why),) = write_tokenizer(program_with(source), out)
    assert where == "tokenizer" and "copied as they are" in why
    assert (out / "tokenizer.json").read_text() == '{"version": "1.0", "model": 3}'
    assert out / "tokenizer.json" in files


def script(path: Path, name: str) -> ModuleType:
    """Import a script of an output folder."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("template", [None, TURNS, PLAIN])
@pytest.mark.parametrize("begin", [(), ("<s>",)])
def test_every_form_puts_the_same_tokens_before_a_prompt(
    template: str | None,
    begin: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    tokenizer = byte_tokenizer(begin=begin)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    report = go.emit(program_with(tmp_path / "source"), out, emit=("torch", "onnx"))
    assert report.artifact is not None
    run = report.artifact.usage
    assert any(line.startswith(f"python {out}/onnx/generate.py --prompt") for line in run)
    assert any(("jinja2" in line) == (template is not None) for line in run if "model.py" in line)

    model = open_language_model(str(out), "torch")
    reference = AutoTokenizer.from_pretrained(tmp_path / "source")
    of_model, of_genai = script(out / "model.py", "model"), script(out / "onnx/generate.py", "run")
    for raw in (False, True):
        ids = encode_prompt(reference, "say the", raw=raw)
        found = og.Tokenizer(og.Model(str(out / "onnx")))
        assert of_genai.encode(found, out / "onnx", "say the", raw) == ids
        assert of_model.encode(out, "say the", raw)[0] == ids
        start = reference.bos_token_id
        written = raw or template is None or template is TURNS
        assert ids.count(start) == (start is not None and written)
        assert (ids[0] == start) == (start is not None and written)

        # The lines that are printed work as printed.
        answer = list(generate(model, reference, "say the", max_new_tokens=8, greedy=True, raw=raw))
        for place in ("model.py", "onnx/generate.py"):
            options = ["--prompt", "say the", "--new", "8", *["--raw"] * raw]
            monkeypatch.setattr(sys, "argv", [str(out / place), *options])
            script(out / place, "line").main()
            assert capsys.readouterr().out == "".join(answer) + "\n"


def test_onnxruntime_genai_ends_and_draws_as_the_model_states(tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    program = program_with(tmp_path / "source")
    ids = byte_tokenizer()("hello")["input_ids"]
    go.emit(program, tmp_path / "free", emit=("onnx",))
    free = list(
        generate_ids(open_language_model(str(tmp_path / "free")), ids, stop=set(), max_new_tokens=8)
    )
    # Greedy decoding stops at the second end token, though top-k would draw from 40.
    program.generation = {"eos_token_id": [299, free[4]], "top_k": 40, "do_sample": False}
    go.emit(program, tmp_path / "out", emit=("onnx",))
    folder = tmp_path / "out" / "onnx"
    params = og.GeneratorParams(og.Model(str(folder)))
    params.set_search_options(max_length=len(ids) + 8)
    generator = og.Generator(og.Model(str(folder)), params)
    generator.append_tokens(ids)
    made = []
    while not generator.is_done():
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    assert made == free[: free.index(free[4]) + 1]
    model = open_language_model(str(folder))
    ends = end_tokens(model, byte_tokenizer())
    assert ends == {299, free[4]}
    assert list(generate_ids(model, ids, stop=ends, max_new_tokens=8)) == made[:-1]


def test_a_tokenizer_is_read_once_until_its_files_change(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    first = read_tokenizer(folder)
    assert read_tokenizer(folder) is first
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "model_max_length": 77}), encoding="utf-8"
    )
    assert read_tokenizer(folder).model_max_length == 77 != first.model_max_length
