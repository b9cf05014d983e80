"""The sweep over families of models that see, on one of them; and the table of what it found."""

from __future__ import annotations

import pytest
from checkpoints import own_modules


@pytest.mark.exhaustive
@pytest.mark.usefixtures(own_modules.__name__)
def test_a_family_is_right_in_every_form(tools, tmp_path):
    sweep = tools("sweep_vision")
    row = sweep.sweep("llava", tmp_path / "work")
    assert set(row["results"]) == {
        "capture", "program", "torch", "hf", "prune-blocks, torch", "prune-blocks, hf",
        "carve-moe, torch", "carve-moe, hf",
    }  # fmt: skip
    for name, result in row["results"].items():
        limit = None if name == "capture" else sweep.TOLERANCE
        assert sweep.verdict(result, limit) == "right", name


def test_the_table_shows_refusals_and_what_is_wrong(tools, monkeypatch):
    tables = tools("family_tables")
    right = dict.fromkeys(("capture", "program", "torch", "hf", "carve-moe, hf"), "right")
    found = {
        "a": {"verdicts": right | {"hf": "it has no checkpoint", "torch": "! one: 0.2"}},
        "b": {"verdicts": {"capture": "its layout is unknown"}},
    }
    result = {"families": found, "versions": {"torch": "1", "transformers": "2"}, "date": "now",
              "device": "a CPU", "command": "x"}  # fmt: skip
    monkeypatch.setattr(tables, "result_of", lambda name: result)
    lines = tables.vision_families().split("\n")
    assert lines[0] == "| family | program | torch | hf | carve-moe, hf |"
    assert lines[2] == "| a | right | **wrong** | [1] | right |"
    assert lines[3] == "| b | [2] | [2] | [2] | [2] |"
    assert "1. it has no checkpoint" in lines and "2. its layout is unknown" in lines
