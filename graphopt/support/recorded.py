"""Functions of tensors, recorded as CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device on which everything is recorded.

    torch hands out 32 streams in turn, and keeps for each that cuBLAS ever ran on a workspace, of
    32 MiB on Hopper: with a stream for each recording they would come to 1 GiB.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> Iterator[None]:
    """Record what is launched meanwhile in a CUDA graph.

    An older graph that is freed meanwhile would spoil the recording, and Python frees what lies in
    a circle of references at any time. So it does not until the recording has ended.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        # Threads of torch look after collectives meanwhile, where there are ranks.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        if collects:
            gc.enable()


def record(
    work: Callable[[], T],
    device: torch.device | None = None,
    *,
    runs: int = 1,
    pool: Any = None,
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Return work as a CUDA graph, and what it returned when it was recorded.

    A recording computes nothing: what was returned has its values after the graph's first replay.

    Args:
        work: It waits for nothing on the device.
        device: Where it runs, with its index; by default the current one.
        runs: How often it is run as it is before. Whatever is compiled, loaded or allocated at a
            first call must not be in the recording, so 0 is for work that has been run.
        pool: `pool()` of an older graph, whose memory this one uses too: the two never run at once,
            and neither reads what it left there before the other ran. By default the graph has
            memory of its own, 2 MiB and for large blocks 20 MiB at least.

    Raises:
        RuntimeError: It cannot be recorded: another thread uses the device meanwhile, say.
    """
    device = device or torch.device("cuda", torch.cuda.current_device())
    main, stream = torch.cuda.current_stream(device), _stream_of(device)
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        for _ in range(runs):
            work()
    main.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with _recording(graph, stream, pool):
        returned = work()
    return graph, returned


class Recorded:
    """A function of tensors as a CUDA graph: its thousand small kernels are launched at once.

    Args:
        work: See `record`. It is called twice.
        tensors: Operands to record it with; those of later calls have their shapes.

    Raises:
        RuntimeError: It cannot be recorded.
    """

    def __init__(self, work: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> None:
        self._places = [tensor.clone() for tensor in tensors]
        device = tensors[0].device if tensors else None
        self._graph, self._results = record(lambda: work(*self._places), device)

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for place, tensor in zip(self._places, tensors, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return tuple(result.clone() for result in self._results)
