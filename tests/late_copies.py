"""Copies that take place when somebody waits for them, and no moment earlier."""

from __future__ import annotations

from collections.abc import Callable

from graphopt.runtime.copies import Copies


class LateCopies(Copies):
    """The slowest copies that there are: who reads without waiting reads what was there before."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], None]] = []
        self.done = 0

    def start(self, copy: Callable[[], None]) -> int:
        self.asked.append(copy)
        return len(self.asked)

    def wait(self, copied: int) -> None:
        for copy in self.asked[self.done : copied]:
            copy()
        self.done = max(self.done, copied)
