"""Functions that are recorded as CUDA graphs: on which stream, and with what kept off meanwhile."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from imitated_streams import imitated_streams
from torch import Tensor

from graphopt.runtime.decoder import Decoder
from graphopt.support.recorded import Recorded, record

ROOT = Path(__file__).parent.parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("runs", [0, 1, 3])
def test_a_recording_keeps_the_collector_off(runs: int, collects: bool) -> None:
    """A graph that Python frees meanwhile would spoil it; afterwards all is as it was."""
    was: list[bool] = []
    (gc.enable if collects else gc.disable)()
    try:
        with imitated_streams() as noted:
            _, returned = record(lambda: was.append(gc.isenabled()) or len(was), runs=runs)
        assert gc.isenabled() is collects
    finally:
        gc.enable()
    assert returned == runs + 1
    assert was == [collects] * runs + [False]
    assert [each.collects for each in noted.recordings] == [False]


def test_the_collector_is_on_again_after_a_failure() -> None:
    def fails() -> None:
        raise RuntimeError("not on this stream")

    with imitated_streams(), pytest.raises(RuntimeError, match="not on this stream"):
        record(fails, runs=0)
    assert gc.isenabled()


def test_all_recordings_of_a_device_share_a_stream() -> None:
    """Libraries keep memory for each stream that they ever ran on."""
    with imitated_streams() as noted:
        for _ in range(3):
            record(lambda: None)
            Recorded(lambda x: (x + 1,), [torch.zeros(2)])
        record(lambda: None, torch.device("cuda", 1))
    # Of cuda:0, of the CPU that stands in for it, and of cuda:1.
    assert len(noted.streams) == 3
    used = [noted.streams.index(each.stream) for each in noted.recordings]
    assert used == [0, 1] * 3 + [2]
    assert all(each.pool is None for each in noted.recordings)


class Texts(Decoder):
    """A decoder on a CPU that records its steps, each as another turn."""

    def _records(self) -> bool:
        return True

    def _turn(self) -> int:
        return self.used


class Model(torch.nn.Module):
    """As much of an emitted model as a decoder asks of it, without any attention."""

    kv_layouts, kv_bits = (), ()

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(11, 11))

    def empty_cache(self) -> list[Any]:
        return []

    def forward(self, ids: Tensor, *_: Any) -> tuple[Tensor, list[Any]]:
        return self.table[ids], []


def test_decoders_record_as_everything_does() -> None:
    with imitated_streams() as noted:
        for _ in range(2):
            decoder = Texts(Model(), 8)
            decoder.start([3])
            for _ in range(4):
                decoder.step()
            assert len(decoder.graphs) == 4
    assert len(noted.recordings) == 8 and len(noted.streams) == 1
    assert not any(each.collects for each in noted.recordings)
    # All graphs of a decoder have the memory of its first.
    first, second = noted.recordings[0].graph, noted.recordings[4].graph
    assert [each.pool for each in noted.recordings] == [None, *[first] * 3, None, *[second] * 3]


def test_graphs_are_recorded_in_one_place() -> None:
    """Nowhere else is thought of what has to be kept off, and of what a stream keeps."""
    found = [
        str(path.relative_to(ROOT))
        for folder in ("graphopt", "lowering", "passes", "runtime", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"cuda\.graph\(|capture_begin\(|cuda\.CUDAGraph\(", path.read_text("utf-8"))
    ]
    assert found == ["graphopt/support/recorded.py"]


@pytest.mark.gpu
@needs_gpu
def test_recordings_leave_no_memory_behind() -> None:
    """More of them than torch has streams: cuBLAS would keep a workspace for each stream."""
    x = torch.randn(256, 256, device="cuda", dtype=torch.float16)

    def recordings(count: int) -> int:
        for _ in range(count):
            graph, product = record(lambda: x @ x)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(product, x @ x)
            del graph, product
        return torch.cuda.memory_allocated()

    before = recordings(1)
    assert recordings(40) <= before


@pytest.mark.gpu
@needs_gpu
def test_graphs_of_one_pool_have_one_memory() -> None:
    x, y = (torch.randn(2048, 2048, device="cuda", dtype=torch.float16) for _ in range(2))
    results = [torch.empty_like(x) for _ in range(6)]

    def work(number: int) -> None:
        results[number].copy_((x + number) @ y)

    graphs = [record(lambda: work(0))[0]]
    before = torch.cuda.memory_reserved()
    graphs += [
        record(lambda number=number: work(number), pool=graphs[0].pool())[0]
        for number in range(1, 6)
    ]
    assert torch.cuda.memory_reserved() <= before
    for _ in range(2):
        for result in results:
            result.zero_()
        for graph in reversed(graphs):
            graph.replay()
        for number, result in enumerate(results):
            assert torch.equal(result, (x + number) @ y)
