"""Programs of small models that see, captured once."""

from __future__ import annotations

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
