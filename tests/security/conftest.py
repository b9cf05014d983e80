"""An output folder to attack, and the ways to open it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from programs import tiny_program
from tiny_models import byte_tokenizer

import graphopt as go


@pytest.fixture(scope="session")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch artifact with a tokenizer, as graphopt writes it."""
    root = tmp_path_factory.mktemp("genuine")
    byte_tokenizer().save_pretrained(root / "tokenizer")
    program = tiny_program(layers=2, vocab=300, cache=True)
    program.tokenizer = str(root / "tokenizer")
    go.emit(program, root / "out", emit=("torch",))
    return root / "out"


@pytest.fixture
def artifact(genuine: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(genuine, tmp_path / "artifact"))
