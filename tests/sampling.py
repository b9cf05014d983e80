"""Parameters of which a few run in the inner test loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *few: Any) -> list[Any]:
    """Return the values as parameters of a test, marked as slow but for a few.

    Each alone takes a second or less; together they are what a change does not wait for.
    """
    return [v if v in few else pytest.param(v, marks=pytest.mark.slow) for v in values]
