"""Functions of tensors, recorded as CUDA graphs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


@contextlib.contextmanager
def recording(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """Record what is launched meanwhile in a CUDA graph.

    An older graph that is freed meanwhile would spoil the recording, and Python frees what lies in
    a circle of references at any time. So it does not until the recording has ended.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        # Threads of torch look after collectives meanwhile, where there are ranks.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        if collects:
            gc.enable()


class Recorded:
    """A function of tensors as a CUDA graph: its thousand small kernels are launched at once.

    Args:
        work: It waits for nothing on the device. It is called twice: once as it is, since what is
            set up at a first call is not recorded, and once to be recorded.
        tensors: Operands to record it with; those of later calls have their shapes.

    Raises:
        RuntimeError: It cannot be recorded: another thread uses the device meanwhile, say.
    """

    def __init__(self, work: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> None:
        self._places = [tensor.clone() for tensor in tensors]
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work(*self._places)
        torch.cuda.current_stream().wait_stream(stream)
        with recording(self._graph):
            self._results = work(*self._places)

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for place, tensor in zip(self._places, tensors, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return tuple(result.clone() for result in self._results)
