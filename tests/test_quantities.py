"""Sizes as people write them."""

from __future__ import annotations

import pytest

from graphopt.errors import UsageError
from graphopt.support.quantities import parse_bytes


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
