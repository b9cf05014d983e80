"""Sizes as people write them."""

from __future__ import annotations

import pytest

from graphopt.errors import UsageError
from graphopt.support.quantities import counted, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5g", 1_500_000_000), ("512", 512),
     ("80kB", 80_000), ("2TiB", 2**41)],
)  # fmt: skip
def test_sizes_are_read(text, size):
    assert parse_bytes("--memory", text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "-3GB", "1e9", "24 gigabytes", "9999999TB", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="is no size"):
        parse_bytes("--memory", text)


def test_one_of_a_kind_is_no_plural():
    said = [counted(number, "step") for number in (0, 1, 2, 2048)]
    assert said == ["0 steps", "1 step", "2 steps", "2,048 steps"]
