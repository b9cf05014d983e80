"""Seconds, by what they were spent on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Counts the seconds of several kinds of work, which may lie inside each other.

    Args:
        names: The names of the kinds of work.

    Attributes:
        seconds: Those of each kind, by name, without what other kinds inside it took.
    """

    def __init__(self, *names: str) -> None:
        self.seconds = dict.fromkeys(names, 0.0)
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Count the body's seconds as those of one kind."""
        self._lap()
        self._running.append(name)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
