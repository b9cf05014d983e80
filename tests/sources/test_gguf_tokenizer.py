"""The converted tokenizer in onnxruntime-genai, which reads tokenizer.json by its own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import onnx
import pytest
from onnx import TensorProto, helper
from tiny_models import add_tokenizer, tiny_model, write_gguf
from transformers import AutoTokenizer
from vocabularies import file_of, scored

from graphopt.sources import open_model
from graphopt.sources.gguf.tokenizer import gguf_tokenizer
from graphopt.sources.gguf.vocabulary import read_vocabulary

pytestmark = pytest.mark.oldest

genai = pytest.importorskip("onnxruntime_genai")

TEXTS = ["the 12  34\n\n5. abc", "naïve 日本語 🙂", "  a  b\tc", "I'll go, don't", "the<end>the"]


def genai_model(folder: Path) -> Path:
    """Add the smallest graph that genai opens: the logits are the input ids."""
    past: list[str | int | None] = ["batch", 1, "past", 4]
    present: list[str | int | None] = ["batch", 1, "total", 4]
    names = ["key", "value"]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["numbers", "axis"], ["logits"]),
            *(
                helper.make_node("Identity", [f"past_key_values.0.{n}"], [f"present.0.{n}"])
                for n in names
            ),
        ],
        "ids",
        [
            info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            info("attention_mask", TensorProto.INT64, ["batch", "total"]),
            *(info(f"past_key_values.0.{n}", TensorProto.FLOAT, past) for n in names),
        ],
        [
            info("logits", TensorProto.FLOAT, ["batch", "sequence", 1]),
            *(info(f"present.0.{n}", TensorProto.FLOAT, present) for n in names),
        ],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    ends = {"bos_token_id": 258, "eos_token_id": 258, "pad_token_id": 258}
    decoder = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "head_size": 4,
        "hidden_size": 4,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    config = {"type": "llama", "vocab_size": 1, "context_length": 64, "decoder": decoder, **ends}
    (folder / "genai_config.json").write_text(
        json.dumps({"model": config, "search": {"max_length": 64}})
    )
    return folder


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_genai_reads_the_tokenizer_as_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pre: str
) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tiny_models.add_tokenizer", lambda writer: add_tokenizer(writer, pre))
    path = write_gguf(tmp_path / "m.gguf", tiny_model(), gguf.MODEL_ARCH.LLAMA, tokenizer=True)
    folder = open_model(str(path)).tokenizer
    assert folder is not None
    shutil.copytree(folder, tmp_path / "onnx")
    tokenizer = genai.Tokenizer(genai.Model(str(genai_model(tmp_path / "onnx"))))
    reference = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = reference(text)["input_ids"]
        assert list(tokenizer.encode(text)) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("prefix", [True, False])
def test_genai_merges_by_score_as_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: bool
) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    # With a space in front genai cuts at every other one.
    file = file_of(scored(across_words=not prefix), add_space_prefix=prefix)
    folder = gguf_tokenizer(file, read_vocabulary(file))
    assert folder is not None
    shutil.copytree(folder, tmp_path / "onnx")
    tokenizer = genai.Tokenizer(genai.Model(str(genai_model(tmp_path / "onnx"))))
    reference = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "The quick brown fox"]:
        if prefix and "\n\n" in text:
            continue  # and puts none behind a token of the vocabulary
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert list(tokenizer.encode(text)) == ids, text
        decoded = tokenizer.decode(ids)
        assert decoded.removeprefix(" " if prefix else "") == reference.decode(ids)
