"""Checkpoint folders, hub ids and bare configs: what is opened, and what is refused and how."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from tiny_models import save_tiny, tiny_model

from graphopt.errors import SourceError
from graphopt.sources import open_model
from graphopt.sources.huggingface import read_config

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def write_config(folder: Path, **entries: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries))
    return str(folder)


def test_folder(tiny: Path) -> None:
    source = open_model(str(tiny))
    assert (source.kind, source.name, source.tokenizer) == ("hf", "tiny", tiny)
    assert source.config is not None and source.config.model_type == "llama"
    assert source.dtype == torch.float32 and source.program is None
    state = tiny_model().state_dict()
    assert set(source.producers) == set(state)
    for name, tensor in state.items():
        assert torch.equal(source.producers[name].load(), tensor)


def test_sharded_folder_in_bf16(tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    source = open_model(str(tmp_path / "m"))
    assert source.dtype == torch.bfloat16 and source.tokenizer is None
    assert set(source.producers) == set(model.state_dict())


def test_missing_shard(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SourceError, match=f"Shard {shard.name} of the checkpoint is missing"):
        open_model(str(tmp_path / "m"))


@pytest.mark.parametrize("spec", ["config:{}", "{}"])
def test_bare_config(tiny: Path, spec: str) -> None:
    source = open_model(spec.format(tiny / "config.json"))
    assert (source.kind, source.producers, source.tokenizer) == ("config", {}, None)
    assert source.config is not None and source.config.hidden_size == 32


def test_pickle_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", model_type="llama")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(SourceError, match=r"pickle \(pytorch_model\.bin\).*save_pretrained"):
        open_model(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", "an adapter"),
        ("model-00001-of-00002.safetensors", r"but no model\.safetensors\.index\.json"),
        ("notes.md", "no weights"),
    ],
)
def test_folder_without_weights(tmp_path: Path, name: str, message: str) -> None:
    folder = write_config(tmp_path / "m", model_type="llama")
    (tmp_path / "m" / name).touch()
    with pytest.raises(SourceError, match=message):
        open_model(folder)


def test_code_of_a_checkpoint_never_runs_unasked(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = Path(write_config(tmp_path / "m", model_type="evil", auto_map=auto_map))
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"open({str(mark)!r}, 'w').close()\n"
        "class Config(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    with pytest.raises(SourceError, match=r"auto_map.*--trust-remote-code"):
        open_model(str(folder))
    assert not mark.exists()
    config = read_config(folder / "config.json", trust_remote_code=True)
    assert mark.exists() and config.model_type == "evil"


def test_own_class_is_used_where_a_known_type_brings_code(tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "evil.Model"}
    folder = write_config(tmp_path / "m", model_type="llama", auto_map=auto_map)
    config = open_model(f"config:{folder}/config.json").config
    assert type(config).__module__.startswith("transformers.")
    assert not hasattr(config, "auto_map")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "t5"}, "'t5', which is an encoder-decoder"),
        ({"model_type": "bart"}, "'bart', which is an encoder-decoder"),
        ({"model_type": "git"}, r"takes more than text \(vision_config\)"),
        ({"model_type": "idefics2"}, r"more than text \(perceiver_config, vision_config\)"),
        ({"model_type": "gemma4"}, r"takes more than text \(audio_config, vision_config\)"),
        ({"model_type": "qwen2_audio"}, r"takes more than text \(audio_config\)"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "blt"}, r"is made of several models \(decoder_config, encoder_config"),
        (
            {"model_type": "emu3_text_model", "architectures": ["Emu3ForCausalLM"]},
            "the text part of a model of another type",
        ),
        (
            {"model_type": "gemma4_assistant", "backbone_hidden_size": 8},
            "an assistant that computes with the states",
        ),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "head of BertForMaskedLM"),
        ({"model_type": "lama"}, "transformers does not know"),
        ({"hidden_size": 8}, "states no model_type"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "hidden size"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
            "quantised by 'gptq'",
        ),
    ],
)
def test_other_models_are_refused_with_the_reason(
    tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    folder = write_config(tmp_path / "m", **entries)
    with pytest.raises(SourceError, match=message):
        open_model(f"config:{folder}/config.json")


def test_malformed_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match="not valid JSON"):
        open_model(str(tmp_path))


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm.gguf").touch()
    (tmp_path / "inner").mkdir()
    write_config(tmp_path / "inner" / "tiny", model_type="llama")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"no file or folder.*Did you mean 'smollm\.gguf'"):
        open_model("smolm.gguf")
    with pytest.raises(SourceError, match=r"\.gguf files and no config\.json.*Name the file"):
        open_model(".")
    with pytest.raises(SourceError, match=r"neither config\.json nor program\.json.*inner/tiny"):
        open_model("inner")
    with pytest.raises(SourceError, match="There is no file or folder"):
        open_model("./nothing/here")
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(SourceError, match="a kind graphopt does not open"):
        open_model("weights.safetensors")
    with pytest.raises(SourceError, match=r"smollm\.gguf is empty"):
        open_model("smollm.gguf")


ANSWER: Any = SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "hub is out of reach.*Connect to a network"),
        (RepositoryNotFoundError("404", response=ANSWER), "no such model on the hub"),
        (GatedRepoError("403", response=ANSWER), "accepted its terms.*hf auth login"),
        (Exception("slow\nvery"), "could not be downloaded from the hub: slow"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SourceError, match=message):
        open_model("someone/some-model")


def test_misspelt_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="Did you mean 'demo'"):
        open_model("dmeo")


def test_hub_download(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    asked: dict[str, Any] = {}

    def download(spec: str, **options: Any) -> str:
        asked.update(options, spec=spec)
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_model("someone/small-one")
    assert (source.name, source.kind, source.spec) == ("small-one", "hf", "someone/small-one")
    assert asked["spec"] == "someone/small-one"
    assert not {"*.bin", "*.py", "*"} & set(asked["allow_patterns"])


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_config(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", model_type="llama")
    (tmp_path / "m" / "config.json").chmod(0)
    with pytest.raises(SourceError, match="Permission denied"):
        open_model(folder)
