"""Programs of small models that see, captured once."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from vision_models import save_vision

import graphopt as go


@pytest.fixture(scope="session")
def vision_program(tmp_path_factory):
    """Return the program of a family's small model; nobody changes it."""
    made = {}

    def program(family):
        if family not in made:
            folder = save_vision(tmp_path_factory.mktemp(family), family)
            made[family] = go.capture(str(folder))
        return made[family]

    return program


@pytest.fixture
def tools(monkeypatch):
    """Return the tools' modules by name, which are no part of the package."""
    folder = Path(__file__).resolve().parents[2] / "tools"
    known = set(sys.modules)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module
    for path in folder.glob("*.py"):
        if path.stem not in known:
            sys.modules.pop(path.stem, None)
