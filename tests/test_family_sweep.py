"""A sample of the sweep over families; tools/sweep_families.py runs all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_configs import families
from family_sweep import sweep, verdicts


@pytest.mark.slow
@pytest.mark.parametrize("family", ["arcee", "glm4", "granite_swa"])
def test_drawn_configs_are_right_in_every_form(family: str, tmp_path: Path) -> None:
    row = sweep(family, 14, 0, tmp_path)
    assert set(verdicts(row).values()) == {"right"}, (verdicts(row), row["config"])


@pytest.mark.slow
def test_a_decoder_that_counts_the_tokens_of_a_step_goes_on_counting(tmp_path: Path) -> None:
    row = sweep("pegasus", 14, 0, tmp_path, forms=("program", "torch", "onnx"))
    assert set(verdicts(row).values()) == {"right"}, (verdicts(row), row["config"])


@pytest.mark.slow
def test_a_family_of_experts_is_pruned_and_not_carved(tmp_path: Path) -> None:
    row = sweep("olmoe", 14, 0, tmp_path, forms=(), recipes=("prune-blocks", "carve-moe"))
    found = verdicts(row)
    assert found.pop("carve-moe").endswith("it is a mixture of experts already.")
    assert set(found.values()) == {"right"}, (found, row["config"])


def test_every_family_is_drawn_from() -> None:
    assert len(families()) > 150 and {"llama", "mixtral", "gpt_neo"} <= set(families())
