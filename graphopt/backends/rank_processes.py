"""An emitted model for several ranks, run by as many processes that torchrun starts and watches."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.backends.rank_worker import ADDRESS, KEY
from graphopt.backends.running_module import ModuleFacts
from graphopt.errors import GraphoptError, SourceError

_INTERVAL, _GRACE = 0.5, 30.0
"""Seconds between two looks at whether ranks live, and for which they may take to end."""


@dataclass(eq=False)
class RankCache:
    """A cache that lies in the ranks, under a number.

    Attributes:
        capacity: How many tokens it has room for; None where it grows.
        newest_only: It is that of one text, of which the newest token's logits are asked for.
    """

    number: int
    capacity: int | None = None
    newest_only: bool = False


class RankProcesses:
    """The ranks of a model, asked as one.

    All of them are asked the same, so that they meet in their collectives; the first one answers.
    Tokens are chosen here, once for all ranks.

    Args:
        count: How many.
        path: `model.py`, whose text is to be run.
        weights: The folder of its weights.
        device: The kind of their devices.

    Raises:
        SourceError: The model cannot be loaded.
        GraphoptError: A rank ended.
    """

    def __init__(
        self, count: int, path: Path, weights: Path, device: torch.device, facts: ModuleFacts
    ) -> None:
        self._number, self._made = 0, 0
        self._dropped: list[int] = []
        self._said = tempfile.TemporaryDirectory(prefix="graphopt-ranks-")
        key = secrets.token_bytes(32)
        with Listener(("127.0.0.1", 0), backlog=count, authkey=key) as listener:
            self._torchrun = _torchrun(count, listener.address[1], key, self._output)
            # What torchrun is sent it sends to its ranks, and waits for them.
            self._finalizer = weakref.finalize(self, _end, self._torchrun)
            self._ranks = self._connected(listener, count)
        for rank in self._ranks:
            rank.connection.send((path, weights, str(device), facts))
        self._answered()

    def _connected(self, listener: Listener, count: int) -> list[_Rank]:
        """Return the connections of all ranks, by their numbers."""
        found: dict[int, _Rank] = {}
        accepted: queue.SimpleQueue[Connection] = queue.SimpleQueue()

        def accept() -> None:
            with contextlib.suppress(OSError, EOFError):  # the listener was closed
                while True:
                    accepted.put(listener.accept())

        threading.Thread(target=accept, daemon=True).start()
        while len(found) < count:
            try:
                connection = accepted.get(timeout=_INTERVAL)
            except queue.Empty:
                if self._torchrun.poll() is not None:
                    raise self._ended() from None
                continue
            number = connection.recv()
            found[number] = _Rank(connection)
        return [found[number] for number in range(count)]

    def _ask(self, what: str, given: Any) -> Any:
        """Ask all ranks the same, and return what the first one answers."""
        self._number += 1
        try:
            for rank in self._ranks:
                rank.connection.send((self._number, what, given))
        except OSError:
            raise self._ended() from None
        return self._answered()

    def _answered(self) -> Any:
        """Return the first rank's answer once all have one.

        Raises:
            SourceError: They failed at what they were asked.
            GraphoptError: One ended.
        """
        answers = [self._answer_of(rank) for rank in self._ranks]
        for state, answer in answers:
            if state == "failed":
                raise SourceError(*answer)
        return answers[0][1]

    def _answer_of(self, rank: _Rank) -> tuple[str, Any]:
        while True:
            answer = rank.answers.get()
            if answer is None:
                raise self._ended()
            number, state, value = answer
            if number == self._number:  # what was asked before an interruption is nobody's any more
                return state, value

    def _ended(self) -> GraphoptError:
        """Return what is said where a rank has ended, by what the ranks said themselves."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._torchrun.wait(_GRACE)
        text = self._output.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = [line for line in lines if re.match(r"rank \d+ ends: ", line)]
        errors = [line for line in lines if "Error: " in line]
        reason = (said or errors or lines or ["no message"])[0]
        return GraphoptError(f"The ranks of the model have ended: {reason.rstrip('.')}.")

    @property
    def _output(self) -> Path:
        """The file of what the ranks write to their standard output and errors."""
        return Path(self._said.name) / "output.txt"

    def start(self, batch: int) -> RankCache:
        """See `LanguageModel.start`."""
        cache = self._new_cache()
        self._ask("start", (cache.number, batch))
        return cache

    def start_text(self, room: int) -> RankCache:
        """See `LanguageModel.start_text`."""
        cache = self._new_cache()
        cache.capacity = self._ask("start_text", (cache.number, room))
        cache.newest_only = True
        return cache

    def capacity(self, cache: RankCache) -> int | None:
        """See `LanguageModel.capacity`."""
        return cache.capacity

    def step(self, inputs: Mapping[str, Tensor], cache: RankCache) -> tuple[Tensor, RankCache]:
        """See `LanguageModel.step`."""
        dropped = self._dropped[:]
        del self._dropped[: len(dropped)]
        # Tensors would come as handles to memory that is shared, which numpy's arrays don't.
        arrays = {name: value.numpy() for name, value in inputs.items()}
        given = (dropped, cache.number, cache.newest_only, arrays)
        return torch.from_numpy(self._ask("step", given)), cache

    def log_likelihoods(self, input_ids: Tensor) -> Tensor:
        """See `LanguageModel.log_likelihoods`."""
        return torch.from_numpy(self._ask("log_likelihoods", input_ids.numpy()))

    def _new_cache(self) -> RankCache:
        self._made += 1
        made = RankCache(self._made)
        weakref.finalize(made, self._dropped.append, self._made)
        return made


class _Rank:
    """The connection to a rank, and what came through it, None at its end.

    A thread reads: what interrupts the main one then leaves no answer half read.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.answers: queue.SimpleQueue[tuple[int, str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.answers.put(self.connection.recv())
        self.answers.put(None)


def _torchrun(count: int, port: int, key: bytes, output: Path) -> subprocess.Popen[bytes]:
    """Start the ranks, whose standard output and errors go to a file."""
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    environment |= {ADDRESS: str(port), KEY: key.hex()}
    # Ctrl-C is for this process alone: it ends an answer, and not the ranks.
    with output.open("wb") as file:
        return subprocess.Popen(
            [
                sys.executable, "-P", "-m", "torch.distributed.run", "--standalone",
                "--local-addr=127.0.0.1", f"--nproc-per-node={count}",
                "-m", "graphopt.backends.rank_worker",
            ],
            env=environment, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip


def _end(torchrun: subprocess.Popen[bytes]) -> None:
    """End the ranks: their connections have closed, or do now."""
    torchrun.terminate()
    try:
        torchrun.wait(_GRACE)
    except subprocess.TimeoutExpired:
        torchrun.kill()
