"""CUDA streams and graphs that are none: what is asked of them is noted, and runs at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from graphopt.support import recorded


@dataclass(frozen=True)
class Recording:
    """How a graph was recorded.

    Attributes:
        collects: Whether Python's garbage collector was on.
    """

    graph: Any
    stream: Any
    pool: Any
    collects: bool


@dataclass
class Noted:
    """What was asked for.

    Attributes:
        streams: That were made.
        recordings: In their order.
    """

    streams: list[Any] = field(default_factory=list)
    recordings: list[Recording] = field(default_factory=list)


class Graph:
    """A CUDA graph whose replay does nothing."""

    def replay(self) -> None:
        pass

    def pool(self) -> object:
        return self


@contextlib.contextmanager
def imitated_streams(graphs: type = Graph) -> Iterator[Noted]:
    """Put stand-ins in place of what records CUDA graphs.

    Args:
        graphs: The stand-in for `torch.cuda.CUDAGraph`.
    """
    noted = Noted()

    class Stream:
        def __init__(self, device: object = None) -> None:
            noted.streams.append(self)

        def wait_stream(self, other: object) -> None:
            pass

    @contextlib.contextmanager
    def graph(made: Any, *, stream: Any, pool: Any, **how: Any) -> Iterator[None]:
        noted.recordings.append(Recording(made, stream, pool, gc.isenabled()))
        yield

    current = object.__new__(Stream)
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in (
            ("Stream", Stream), ("CUDAGraph", graphs), ("graph", graph),
            ("stream", lambda _: contextlib.nullcontext()),
            ("current_stream", lambda device=None: current), ("current_device", lambda: 0),
        ):  # fmt: skip
            patch.setattr(torch.cuda, name, stand_in)
        recorded._stream_of.cache_clear()
        try:
            yield noted
        finally:
            recorded._stream_of.cache_clear()
