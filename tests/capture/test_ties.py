"""Output matrices that a config ties to the embedding, and checkpoints that hold them apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import cases, eager_logits, error, mostly_slow
from safetensors.torch import save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.errors import SourceError
from graphopt.execute.interpreter import Runner
from graphopt.files.safetensors import read_checkpoint

pytestmark = pytest.mark.oldest

CASE = cases(lengths=(7,))[-1]


def _save(folder: Path, said: bool, output: str, family: str, prefix: str = "") -> Path:
    """Write a checkpoint whose output matrix is another one, equal, or missing.

    Args:
        said: What its config says of tying.
    """
    entries: dict[str, Any] = {"tie_word_embeddings": False}
    if family == "gpt2":
        entries |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300}
    model = tiny_model(family, **entries)
    if output != "other":
        model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight)
    model.save_pretrained(folder)
    tensors = {name: raw.load() for name, raw in read_checkpoint(folder).items()}
    if output == "missing":
        del tensors["lm_head.weight"]
    if output == "alone":
        del tensors[next(name for name in tensors if "embed_tokens" in name or "wte" in name)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tie_word_embeddings": said}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", mostly_slow(["llama", "gpt2"], ["llama"], ["gpt2"]))
@pytest.mark.parametrize(
    ("said", "output"),
    [
        (True, "other"), (True, "equal"), (True, "missing"), (True, "alone"),
        (False, "other"), (False, "equal"),
    ],
)  # fmt: skip
def test_embeddings_are_tied_where_transformers_ties_them(
    family: str, said: bool, output: str, tmp_path: Path
) -> None:
    folder = _save(tmp_path / "model", said, output, family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = eager_logits(model, CASE)
    program = go.capture(str(folder))
    assert error(expected, Runner(program).logits(CASE.inputs), CASE) < 1e-5
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    matrices = [w for w in program.used_weights() if tuple(w.shape) == (300, 32)]
    assert len(matrices) == 2 - tied
    assert program.config["tie_word_embeddings"] == tied
    assert any("both are kept" in note for _, note in program.notes) == (said and not tied)
    # What is written loads as what was read, flag and tensors in accord.
    go.emit(program, tmp_path / "out", emit=("hf", "torch"))
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert again.config.tie_word_embeddings == tied
    assert error(expected, eager_logits(again.eval(), CASE), CASE) < 1e-5
    emitted = open_language_model(str(tmp_path / "out"), "torch")
    found = emitted.logits(CASE.input_ids, CASE.attention_mask)
    assert error(expected, found, CASE) < 1e-5


def test_a_missing_output_matrix_that_nothing_ties_is_refused(tmp_path: Path) -> None:
    # transformers would draw a random one.
    folder = _save(tmp_path / "model", False, "missing", "llama")
    with pytest.raises(SourceError, match=r"no tensor 'lm_head.weight'.*tie_word_embeddings"):
        go.capture(str(folder))


@pytest.mark.slow
def test_each_tie_is_decided_alone(tmp_path: Path) -> None:
    """BERT ties a matrix and a bias: the checkpoint may hold one of them apart."""
    model = tiny_model(
        "bert", is_decoder=True, tie_word_embeddings=True, num_key_value_heads=None, head_dim=None
    )
    model.save_pretrained(tmp_path)
    tensors = {name: raw.load() for name, raw in read_checkpoint(tmp_path).items()}
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    found = Runner(go.capture(str(tmp_path))).logits(CASE.inputs)
    assert error(eager_logits(again, CASE), found, CASE) < 1e-5
