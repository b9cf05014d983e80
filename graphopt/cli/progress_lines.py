"""What long work tells where there is no terminal: a line now and then, as logs take it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from graphopt.support.quantities import format_duration

FIRST_SECONDS = 10.0
"""How long a command runs before it says anything: what is done by then needs no lines."""

PERIOD_SECONDS = 30.0
"""How often the work at hand is named while it goes on."""

LEAST_SHARE = 0.02
"""The share of a task that is done before the time left is guessed from it."""


@dataclass
class _Task:
    """A piece of work that was begun.

    Attributes:
        since: When, in seconds of the clock.
        first: What was done of it then.
        done, total: How much of it is done, and how much it is.
        moved: When `done` last changed.
    """

    since: float
    first: int
    done: int
    total: int
    moved: float

    def seconds_left(self, now: float) -> float | None:
        """Return how long it takes still if it goes on as it did.

        None where too little is done, or where the step at hand takes twice as long as those before
        it together: the past says nothing of it then, and a guess would grow from line to line.
        """
        advanced = self.done - self.first
        if advanced <= 0 or self.done < LEAST_SHARE * self.total:
            return None
        if now - self.moved > 2 * (self.moved - self.since):
            return None
        return (now - self.since) * (self.total - self.done) / advanced


class ProgressLines:
    """A progress callback that writes lines.

    Args:
        say: Writes one.
        clock: Gives seconds.
    """

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        self._start = clock()
        self._tasks: dict[str, _Task] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if done >= total:
            self._tasks.pop(what, None)
        elif what in self._tasks:
            task = self._tasks[what]
            if done != task.done:
                task.moved = self._clock()
            task.done, task.total = done, total
        else:
            self._tasks[what] = _Task(since := self._clock(), done, done, total, since)

    def milestone(self, text: str) -> None:
        """Say what is done, once the command has run for a while."""
        elapsed = self._clock() - self._start
        if elapsed >= FIRST_SECONDS:
            self._say(f"[{format_duration(elapsed)}] {text}")

    def tick(self) -> None:
        """Name the work at hand, the innermost task, with the time left where it can be told."""
        tasks = list(self._tasks.items())
        if not tasks:
            return
        what, task = tasks[-1]
        now = self._clock()
        text = f"[{format_duration(now - self._start)}] {what}"
        if task.total > 1:
            text += f": {100 * task.done / task.total:.0f}%"
            left = task.seconds_left(now)
            text += "" if left is None else f", about {format_duration(left)} left"
        self._say(text)

    @contextlib.contextmanager
    def ticking(self) -> Iterator[None]:
        """Name the work at hand again and again while the body runs."""
        over = threading.Event()

        def run() -> None:
            wait = FIRST_SECONDS
            while not over.wait(wait):
                self.tick()
                wait = PERIOD_SECONDS

        thread = threading.Thread(target=run, name="progress lines", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
