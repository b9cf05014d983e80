"""What becomes of a command when another of its ranks has ended.

What the main thread does ends by an error where it next waits for the others, so that it cleans up
as after any error. Where it waits for a device, which no error reaches, the process is ended. One
rank, the first if it can, tells the user.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.support.rank_watch import SIGN_EVERY, RankEnd, RankWatch

STUCK = 10.0
"""Seconds that a rank whose fellow has ended gets to end by itself: it may wait on a device."""

TOLD = 15.0
"""Seconds that a rank waits for the first one to tell the user why it ends."""

_TOLD, _HEARD = "told", "heard"


class RankError(GraphoptError):
    """Another rank of the run has ended.

    Args:
        code: The exit code of its error.
    """

    def __init__(self, message: str, remedy: str = "", code: int = 1) -> None:
        super().__init__(message, remedy)
        self.exit_code = code


class RankEndings:
    """How this rank of a command hears of the others' ends, and they of its own.

    Args:
        rank, world, of_first: As of `RankWatch`.

    Raises:
        OSError: As `RankWatch` does.
    """

    def __init__(self, rank: int, world: int, of_first: Callable[[Any], Any]) -> None:
        self._over = threading.Event()
        self._watch = RankWatch(rank, world, of_first, self._end_if_stuck)

    def check(self) -> None:
        """Raise what ended another rank, if one has.

        Raises:
            RankError: With its reason.
        """
        if self._watch.end is not None:
            raise _error(self._watch.end)

    def lost(self, said: str, seconds: float) -> RankError:
        """Return the error of a collective that failed: the end of another rank, if there is one.

        Args:
            said: What torch says.
            seconds: How long to wait until one is known.
        """
        self._watch.until(lambda: self._watch.end is not None, seconds)
        if self._watch.end is not None:
            return _error(self._watch.end)
        return RankError(
            f"The ranks have lost each other, though all of them live ({said}).",
            "Look at the network between their hosts.",
        )

    def tell(self, message: str, remedy: str, code: int) -> None:
        """Leave the reason for which this rank ends, unless that is another one's end."""
        self._watch.tell(message, remedy, code)

    def speaks(self, message: str, remedy: str, code: int) -> bool:
        """Leave the reason for which this rank ends; return whether it is to tell the user.

        The first rank does. Another one waits until that has been, since its own end would make
        torchrun end the first, and speaks only if nothing comes.
        """
        watch = self._watch
        try:
            watch.tell(message, remedy, code)
            if watch.rank == 0:
                watch.flag(_TOLD)
                watch.flag(_HEARD)
                # At its end torchrun ends the others, which may have something to clean up.
                watch.until(lambda: watch.flagged(_HEARD), SIGN_EVERY)
                return True
            watch.until(lambda: watch.flagged(_TOLD, by=0) or watch.gone(0), TOLD)
            watch.flag(_HEARD)
            return not watch.flagged(_TOLD, by=0)
        except RankError:  # told to end while it waits
            return False

    def leave(self) -> None:
        """Say that this rank is done, and wait until all are.

        Raises:
            RankError: Another one has ended by an error.
        """
        end = self._watch.leave()
        if end is not None:
            raise _error(end)
        self._over.set()

    def stop(self) -> None:
        """Listen no more."""
        self._over.set()
        self._watch.stop()

    def _end_if_stuck(self, end: RankEnd) -> None:
        """End this process where the work that it is in does not come back to be told."""
        if self._over.wait(STUCK + TOLD * (self._watch.rank != 0)):
            return
        error = _error(end)
        if self.speaks(error.message, error.remedy, error.exit_code):
            sys.stderr.write(f"error: {error.message}\n{error.remedy}\n")
            sys.stderr.flush()
        os._exit(error.exit_code)


def _error(end: RankEnd) -> RankError:
    if end.said:
        return RankError(f"Rank {end.rank}: {end.what}", end.remedy, end.code)
    return RankError(
        f"Rank {end.rank} {end.what}.",
        "What was said last on its host may tell more, and whether memory did not suffice.",
        end.code,
    )
