"""Parameters of which a few run in the inner test loop, or in the suite of every day."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *few: Any) -> list[Any]:
    """Return the values as parameters of a test, marked as slow but for a few.

    Each alone takes a second or less; together they are what a change does not wait for.
    """
    return [v if v in few else pytest.param(v, marks=pytest.mark.slow) for v in values]


def exhaustive_but(values: Iterable[Any], *few: Any) -> list[Any]:
    """Return the values as parameters of a test, marked as exhaustive but for a few.

    The few stand for the others: each shows a feature that none of the rest has alone.
    """
    values = list(values)
    missing = [v for v in few if v not in values]
    assert not missing, f"{missing} are among none of {values}"
    return [v if v in few else pytest.param(v, marks=pytest.mark.exhaustive) for v in values]
