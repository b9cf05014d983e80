"""How long-running work tells what it is doing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`, first with `done` 0 and last with `done == total`."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
