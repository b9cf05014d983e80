"""A sample of the sweep over families; tools/sweep_families.py runs all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_configs import families
from family_sweep import attempt, sweep, verdicts
from sampling import exhaustive_but

from graphopt.errors import VerifyError


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(["arcee", "glm4", "granite_swa"], "glm4"))
def test_drawn_configs_are_right_in_every_form(family: str, tmp_path: Path) -> None:
    row = sweep(family, 14, 0, tmp_path)
    assert set(verdicts(row).values()) == {"right"}, (verdicts(row), row["config"])


@pytest.mark.slow
def test_a_decoder_that_counts_the_tokens_of_a_step_goes_on_counting(tmp_path: Path) -> None:
    row = sweep("pegasus", 14, 0, tmp_path, forms=("program", "torch", "onnx"))
    assert set(verdicts(row).values()) == {"right"}, (verdicts(row), row["config"])


@pytest.mark.slow
def test_a_family_with_norms_behind_its_parts_is_carved(tmp_path: Path) -> None:
    """The gain of the norm behind a part is solved for too: the pass has to state that."""
    row = sweep("glm4", 14, 0, tmp_path, forms=(), recipes=("carve-moe",))
    found = verdicts(row)
    assert any(name.startswith("carve-moe") for name in found)
    assert set(found.values()) == {"right"}, (found, row["config"])


def test_a_program_that_a_pass_breaks_is_no_refusal() -> None:
    def broken() -> dict[str, Any]:
        raise VerifyError("Pass 'carve-moe' did not do what it states.")

    assert set(attempt(broken)) == {"broken", "seconds"}


@pytest.mark.slow
def test_a_family_of_experts_is_pruned_and_not_carved(tmp_path: Path) -> None:
    row = sweep("olmoe", 14, 0, tmp_path, forms=(), recipes=("prune-blocks", "carve-moe"))
    found = verdicts(row)
    assert found.pop("carve-moe").endswith("it is a mixture of experts already.")
    assert set(found.values()) == {"right"}, (found, row["config"])


def test_every_family_is_drawn_from() -> None:
    assert len(families()) > 150 and {"llama", "mixtral", "gpt_neo"} <= set(families())
