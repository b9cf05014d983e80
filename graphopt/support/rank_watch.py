"""Finding out that a rank has ended, and why, so that no other waits for it.

A rank that ends by an error leaves its reason in the store by which the ranks met. Every rank has a
thread that looks there, and leaves a sign of life. What a collective would wait for until its
timeout is so known in a second where there is a reason, and in `SILENT` seconds where there is
none: a rank that was killed leaves no word.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable

from torch._C._distributed_c10d import TCPStore
from torch.distributed import distributed_c10d as dist

from graphopt.errors import GraphoptError

LOOK_EVERY = 0.5
SIGN_EVERY = 2.0
"""Seconds between two looks for a reason, and between two signs of life."""

SILENT = 35.0
"""Seconds without a sign of life after which a rank counts as ended."""

STUCK = 10.0
"""Seconds that a rank whose fellow has ended gets to end by itself: it may wait on a device."""

TOLD = 15.0
"""Seconds that a rank waits for the first one to tell the user why it ends."""


class RankError(GraphoptError):
    """Another rank of the run has ended.

    Args:
        code: The exit code of its error.
    """

    def __init__(self, message: str, remedy: str = "", code: int = 1) -> None:
        super().__init__(message, remedy)
        self.exit_code = code


class Watch:
    """What a rank knows of the others.

    Args:
        rank, world: The number of this one, and how many there are.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._store = _store()
        self._failure: RankError | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="other ranks", daemon=True)

    def start(self) -> None:
        """Begin to look after the other ranks."""
        self._store.add(f"alive/{self.rank}", 1)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def check(self) -> None:
        """Raise what ended another rank, if one has.

        Raises:
            RankError: With its reason.
        """
        if self._failure is not None:
            raise self._failure

    def lost(self, said: str, seconds: float) -> RankError:
        """Return the error of a collective that failed: another rank's reason, if it leaves one.

        Args:
            said: What torch says.
            seconds: How long to wait for a reason.
        """
        until = time.monotonic() + seconds
        while self._failure is None and time.monotonic() < until:
            time.sleep(LOOK_EVERY / 5)
        return self._failure or RankError(
            f"Another rank has ended without a word ({said}).",
            "It may have been killed: its host's log says whether memory did not suffice.",
        )

    def tell(self, message: str, remedy: str, code: int) -> None:
        """Leave the reason for which this rank ends, unless that is another one's end."""
        if self._failure is None:
            said = json.dumps([self.rank, message, remedy, code])
            with contextlib.suppress(RuntimeError):  # who holds the store has ended
                self._store.compare_set("failed", "", said)

    def speaks(self, message: str, remedy: str, code: int) -> bool:
        """Leave the reason for which this rank ends; return whether it is to tell the user.

        The first rank does. Another one waits until that has been, since its own end would make
        torchrun end the first, and speaks only if nothing comes.
        """
        try:
            self.tell(message, remedy, code)
            if self.rank == 0:
                self._store.set("told", "1")
                # It may hold the store, which the others still ask.
                self._until(lambda: self._store.add("heard", 0) == self.world - 1, SIGN_EVERY)
                return True
            told = self._until(lambda: self._store.check(["told"]), TOLD)
            self._store.add("heard", 1)
            return not told
        except RuntimeError:  # who holds the store has ended
            return True
        except RankError:  # told to end while it waits
            return False

    def leave(self) -> None:
        """Say that this rank is done, and wait until all are.

        Raises:
            RankError: Another one has ended by an error.
        """
        self._store.add("left", 1)
        while self._store.add("left", 0) < self.world:
            self.check()
            time.sleep(LOOK_EVERY / 10)
        self._over.set()
        self._thread.join()
        self._store.add("gone", 1)
        if self.rank == 0:  # as above
            self._until(lambda: self._store.add("gone", 0) == self.world, SIGN_EVERY)

    @staticmethod
    def _until(holds: Callable[[], bool], seconds: float) -> bool:
        """Wait until something holds, at most so long; return whether it does."""
        until = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > until:
                return False
            time.sleep(LOOK_EVERY / 10)
        return True

    def _look(self) -> None:
        seen = {rank: (0, time.monotonic()) for rank in range(self.world) if rank != self.rank}
        signed = 0.0
        while not self._over.wait(LOOK_EVERY):
            try:
                self._failure = self._left_reason()
                if self._failure is None and time.monotonic() - signed >= SIGN_EVERY:
                    signed = time.monotonic()
                    self._store.add(f"alive/{self.rank}", 1)
                    self._failure = self._silent(seen)
            except RuntimeError:
                self._failure = RankError(
                    "What holds the ranks together has ended: torchrun, or rank 0.",
                    "Look at what was said last on the host where it ran.",
                )
            if self._failure is not None:
                self._end_if_stuck(self._failure)
                return

    def _left_reason(self) -> RankError | None:
        """Return the reason that another rank left, if one did."""
        if not self._store.check(["failed"]):
            return None
        rank, message, remedy, code = json.loads(self._store.get("failed"))
        if rank == self.rank:
            return None
        return RankError(f"Rank {rank}: {message}", remedy, code)

    def _silent(self, seen: dict[int, tuple[int, float]]) -> RankError | None:
        """Return the error of a rank that has given no sign of life for too long.

        Args:
            seen: For each other rank its last sign, and when that was seen; kept up to date.
        """
        now = time.monotonic()
        if self._store.add("left", 0):  # some are done
            return None
        for rank, (sign, when) in seen.items():
            latest = self._store.add(f"alive/{rank}", 0)
            if latest != sign:
                seen[rank] = (latest, now)
            elif now - when > SILENT:
                return RankError(
                    f"Rank {rank} has given no sign of life for {SILENT:.0f} seconds.",
                    "It, or its host, has ended or hangs: look at what was said last there.",
                )
        return None

    def _end_if_stuck(self, failure: RankError) -> None:
        """End this process where the work that it is in does not come back to be told."""
        if self._over.wait(STUCK + TOLD * (self.rank != 0)):
            return
        if self.speaks(failure.message, failure.remedy, failure.exit_code):
            sys.stderr.write(f"error: {failure.message}\n{failure.remedy}\n")
            sys.stderr.flush()
        os._exit(failure.exit_code)


def _store() -> dist.Store:
    """Return a connection of its own to the store by which the ranks met."""
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
        wait_for_workers=False, timeout=datetime.timedelta(seconds=20),
    )  # fmt: skip
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    run = "/".join(os.environ.get(name, "") for name in names)
    return dist.PrefixStore(f"graphopt/{run}", store)
