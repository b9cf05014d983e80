"""Ranks that share one GPU, each on a stream of its own, and wait there as they would for peers.

CUDA promises no progress to kernels that run side by side. What these tests need for it:

* Nothing is launched for the first time while a rank waits: to load a kernel, or to allocate, the
  driver may wait until all that runs has ended. `warm_up` runs each rank alone before.
* What waits leaves most cores to what the other ranks have still to run in front of their own
  waiting. A product of the library takes all registers of a core, so no kernel that comes behind
  one may lie on every core: such tests have at most `PROGRAMS` programs a rank.
* No two streams share a queue of the device, where one would stand behind what waits in the other:
  tests/conftest.py asks for as many queues as there may be.
* A wait is long enough for whatever else the machine does between the launches of two ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from graphopt.runtime.peer_reduce import Waiting

T = TypeVar("T")
PROGRAMS = 16
"""Of a kernel that waits behind a product, on a GPU of at least four times as many cores."""
_PATIENCE = 5_000_000
"""Some five seconds: other processes may take the processor between two launches."""


class SideBySide:
    """Streams of ranks on one GPU.

    Attributes:
        waiting: What kernels of all ranks are given.
    """

    def __init__(self, ranks: int) -> None:
        self.waiting = Waiting("cuda", _PATIENCE, trap=False)
        self._streams = [torch.cuda.Stream() for _ in range(ranks)]

    def warm_up(self, calls: Sequence[Callable[[], object]]) -> None:
        """Make the call of each rank when that of the one before has ended: none waits.

        A rank that comes before another gives up at once, and what it returns is wrong.
        """
        self.waiting.patience = 1
        for stream, call in zip(self._streams, calls, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.synchronize()
        self.waiting.patience = _PATIENCE
        self.waiting.late.zero_()

    def launch(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Make the calls of all ranks side by side, and return what they return."""
        main, results = torch.cuda.current_stream(), []
        for stream, call in zip(self._streams, calls, strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                results.append(call())
        for stream in self._streams:
            main.wait_stream(stream)
        return results

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """As `launch`, of calls that were warmed up; nobody may have given up waiting."""
        results = self.launch(calls)
        torch.cuda.synchronize()
        assert not self.waiting.late.item(), "a rank gave up waiting"
        return results
