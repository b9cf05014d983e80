"""Mixtures of experts are read, whatever version of transformers wrote their loop over experts."""

from __future__ import annotations

import pytest
from mixtures import mixture

from graphopt.ir.mixture import Mixture, find_mixtures

FAMILIES = ("mixtral", "deepseek_v3", "phimoe")
"""A plain one, one with groups, and one that chooses by two maxima; more are in tests/ir."""


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_read(family: str) -> None:
    _, program = mixture(family)
    found = [part for _, part in find_mixtures(program)]
    assert found and all(isinstance(part, Mixture) for part in found), found
