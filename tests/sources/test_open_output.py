"""An output folder as a model to go on from."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from programs import tiny_program
from tiny_models import byte_tokenizer

from graphopt.sources import open_model


@pytest.mark.parametrize("place", [".", "onnx", "hf", None])
def test_program_and_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str | None
) -> None:
    saved = ModuleType("graphopt.storage.artifact")
    program = tiny_program(layers=1)
    program.name, program.checkpoint_dtype = "small", torch.bfloat16
    program.tokenizer = str(tmp_path / "gone")
    saved.load_program = lambda root: program  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "graphopt.storage.artifact", saved)
    (tmp_path / "program.json").touch()
    if place is not None:
        byte_tokenizer().save_pretrained(tmp_path / place)
    source = open_model(str(tmp_path))
    assert (source.kind, source.name, source.dtype) == ("program", "small", torch.bfloat16)
    assert source.program is program and source.config is None
    expected = None if place is None else tmp_path / place
    assert source.tokenizer == expected
    assert program.tokenizer == (None if expected is None else str(expected))
