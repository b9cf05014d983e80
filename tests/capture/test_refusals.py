"""Models that have no form in the IR: refused soon, in a sentence that names the place."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import graphopt as go
from graphopt.capture import capture
from graphopt.capture.model import build_model
from graphopt.capture.recurrent import refuse_recurrent
from graphopt.capture.unsupported import refuse_unsupported
from graphopt.errors import CaptureError
from graphopt.sources import open_model

_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "head_dim": 8,
}  # fmt: skip

RECURRENT: dict[str, dict[str, Any] | None] = {
    "qwen3_next": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _DELTA,
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"num_experts": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "zamba2": None,
    "nemotron_h": {},
    "kimi_linear": {**_EXPERTS},
    "olmo_hybrid": {},
    "minimax": {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"] * 2},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon_mamba": {},
    "rwkv": {},
    "xlstm": {"num_heads": 4},
}
"""Entries of the config of every family with a state; None for its own defaults."""


ATTENTION_ALONE = {
    "layer_types": ["attention"] * 4,
    "num_local_experts": 0,
    "shared_intermediate_size": 48,
    "position_embedding_type": "rope",
    "mamba_n_heads": 8,
}
"""Granite 4.0 Micro's shape."""


def config_of(family: str, entries: dict[str, Any] | None) -> Any:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {family}")
    return CONFIG_MAPPING[family](**({} if entries is None else _SIZES | entries))


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_mixers_are_found_without_a_trace(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("was traced"))
    model = build_model(config_of(family, RECURRENT[family]))
    with pytest.raises(CaptureError, match=r"^[\w.]*\.\d[\w.]* is a recurrent mixer \(.*layers\."):
        capture(model)


def test_hybrids_without_a_recurrent_layer_pass() -> None:
    refuse_recurrent(build_model(config_of("granitemoehybrid", ATTENTION_ALONE)))
    refuse_recurrent(
        build_model(config_of("lfm2", {"layer_types": ["conv", "full_attention"] * 2}))
    )


@pytest.mark.slow
def test_infinite_numbers_of_a_config_are_read_and_written_back(tmp_path: Path) -> None:
    """As transformers writes them, wherever they stand; Granite 4's configs do."""
    config = config_of("granitemoehybrid", ATTENTION_ALONE)
    config.extra = {"a": [float("-inf"), {"b": float("nan")}]}
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")  # type: ignore[no-untyped-call]
    assert "__float__" in (tmp_path / "m" / "config.json").read_text()
    program = capture(str(tmp_path / "m"))
    go.emit(program, tmp_path / "o", emit=("torch", "hf"))
    written = json.loads((tmp_path / "o" / "hf" / "config.json").read_text())
    assert written["time_step_limit"][1] == {"__float__": "Infinity"}
    again = open_model(str(tmp_path / "o")).program
    assert again is not None
    read = AutoConfig.from_pretrained(tmp_path / "o" / "hf")
    for entries in (read.to_dict(), again.config):
        assert list(entries["time_step_limit"]) == [0.0, float("inf")]
        assert entries["extra"]["a"][0] == float("-inf")
        assert entries["extra"]["a"][1]["b"] != entries["extra"]["a"][1]["b"]


def test_block_sparse_attention_is_refused_and_full_attention_is_not() -> None:
    sizes = {"attention_type": "block_sparse", "is_decoder": True}
    with pytest.raises(CaptureError, match="bert attends to random blocks in longer texts"):
        capture(build_model(config_of("big_bird", sizes)))
    refuse_unsupported(
        build_model(config_of("big_bird", sizes | {"attention_type": "original_full"}))
    )


class _Step(nn.Module):
    """A layer that asks a tensor for its values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rows":
            return x + x[x > 0].sum()
        return x + sum((x[0, :, 0] > 0).long().tolist())


class _Language(nn.Module):
    """A language model around one step that no trace holds."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.layers = nn.ModuleList([_Step(kind)])
        self.kind = kind

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.kind == "branch" and input_ids.max() > 3:
            x = x + 1
        if self.kind in ("rows", "list"):
            x = self.layers[0](x)
        if self.kind == "number":
            x = x + len(range(int(input_ids.shape[1] * 1.0)))
        if self.kind == "shapes":
            x = x @ x
        if self.kind == "own":
            raise ValueError("a word of the model itself")
        warnings.warn("a warning of the model", stacklevel=1)
        logging.getLogger("torch.export").warning("a graph\n" * 100)
        return self.head(x)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("branch", "branches on the values of a tensor"),
        ("rows", "makes a tensor as large as they say"),
        ("list", "branches on the values of a tensor"),
        ("shapes", r"it raises RuntimeError\."),
        ("own", r"it raises ValueError: a word of the model itself\."),
    ],
)
def test_what_no_trace_holds_is_said_by_place_and_cause(
    kind: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError, match=message) as refusal:
        capture(_Language(kind))
    text = str(refusal.value)
    assert "(test_refusals.py, line " in text and "in forward) cannot be traced" in text
    assert "torch" not in text and "\n" not in text
    assert capfd.readouterr() == ("", "")
    assert refusal.value.__cause__ is not None, "--debug shows what torch said"


def test_a_trace_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        capture(_Language(""))
    assert not seen
    assert capfd.readouterr() == ("", "")
