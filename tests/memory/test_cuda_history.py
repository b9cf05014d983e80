"""Joining an allocator's history with a trace, on histories made by hand; a GPU's own with gpu."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from graphopt.memory.cuda_history import history_peak, join, order_errors
from graphopt.memory.recording import record
from graphopt.memory.trace import FREE, MALLOC, READ, WRITE, Instance, Trace

US = 1000


def block(size: int, used: bool) -> dict[str, Any]:
    state = "active_allocated" if used else "inactive"
    return {"size": -(-size // 512) * 512, "requested_size": size, "state": state}


SEGMENTS = [{"address": 4096, "device": 0, "blocks": [block(100, True), block(512, False),
                                                      block(300, True)]}]  # fmt: skip
"""A weight of 100 bytes at 4096, and 300 bytes of a library at 5120."""


def entry(action: str, address: int, size: int, time_us: int) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "time_us": time_us}


HISTORY = [
    entry("segment_alloc", 8192, 2**21, 9),
    entry("alloc", 8192, 40, 12),  # what the first operation gives
    entry("alloc", 16384, 7000, 13),  # a buffer inside it
    entry("free_requested", 16384, 7000, 14),
    entry("free_completed", 16384, 7000, 14),
    entry("free_completed", 8192, 40, 24),
    entry("alloc", 8192, 20, 32),  # another tensor, where the first one was
    entry("alloc", 16384, 9000, 33),  # kept by the library
]

TRACE = Trace(
    instances=[
        Instance(0, 100, "uint8", (100,), "cuda:0", "weight", "", 0, None, external=True),
        Instance(1, 40, "uint8", (40,), "cuda:0", "activation", "aten.mm.default", 0, 3),
        Instance(2, 20, "uint8", (20,), "cuda:0", "activation", "aten.exp.default", 4, None),
    ],
    kind=np.array([MALLOC, READ, WRITE, FREE, MALLOC, WRITE], np.uint8),
    instance=np.array([1, 0, 1, 1, 2, 2], np.int32),
    op=np.array([0, 0, 0, 0, 1, 1], np.int32),
    call=np.array([0, 0, 0, 0, 1, 1], np.int32),
    time_ns=np.arange(6, dtype=np.int64),
    clock="cuda events",
    op_names=["aten.mm.default", "aten.exp.default"],
    iteration_marks=[0, 4],
)
HOST = np.array([10, 10, 15, 24, 30, 35], np.int64) * US
ADDRESSES = [(4096, 5 * US), (8192, 16 * US), (8192, 36 * US)]


@pytest.mark.parametrize("skew_us", [0, 50_000, -50_000])
def test_what_the_allocator_alone_saw_becomes_workspaces(skew_us: int) -> None:
    history = [{**e, "time_us": e["time_us"] + skew_us} for e in HISTORY]
    # An address that is given once says by how much the allocator's clock is off.
    if skew_us:
        history.append(entry("alloc", 65536, 8, 40 + skew_us))
    once = Instance(3, 8, "uint8", (8,), "cuda:0", "activation", "aten.exp.default", 6, None)
    trace = Trace(
        [*TRACE.instances, once],
        np.append(TRACE.kind, MALLOC).astype(np.uint8),
        np.append(TRACE.instance, 3).astype(np.int32),
        np.append(TRACE.op, 1).astype(np.int32),
        np.append(TRACE.call, 1).astype(np.int32),
        np.append(TRACE.time_ns, 6),
        TRACE.clock,
        TRACE.op_names,
        iteration_marks=[0, 4],
    )
    addresses, host = [*ADDRESSES, (65536, 60 * US)], np.append(HOST, 60 * US)
    if not skew_us:
        trace, addresses, host = TRACE, ADDRESSES, HOST
    joined = join(trace, addresses, host, SEGMENTS, history, "cuda:0")
    joined.check()
    found = [
        (i.size, i.producer, i.external)
        for i in joined.instances
        if i.category == "workspace"
    ]  # fmt: skip
    assert found == [
        (300, "", True), (7000, "aten.mm.default", False), (9000, "aten.exp.default", False),
    ]  # fmt: skip
    assert joined.live_bytes().max() == history_peak(SEGMENTS, history)
    assert joined.iteration_marks == [0, 6]
    kept = [i for i in joined.instances if i.category != "workspace"]
    assert [i.size for i in kept] == [i.size for i in trace.instances]


def test_the_peak_of_a_history_is_that_of_a_walk() -> None:
    assert history_peak(SEGMENTS, HISTORY) == 100 + 300 + 20 + 9000
    assert history_peak(SEGMENTS, HISTORY[:5]) == 100 + 300 + 40 + 7000
    assert history_peak([], []) == 0


def test_order_is_that_of_the_history() -> None:
    assert order_errors(TRACE, ADDRESSES, SEGMENTS, HISTORY, "cuda:0") == (2, 0)


def test_an_address_that_is_used_again_is_another_instance() -> None:
    joined = join(TRACE, ADDRESSES, HOST, SEGMENTS, HISTORY, "cuda:0")
    one, other = joined.instances[1], joined.instances[2]
    assert one.died is not None
    assert one.died < other.born


def test_a_trace_without_events_keeps_what_was_in_use() -> None:
    empty = Trace([], *(np.zeros(0, t) for t in (np.uint8, np.int32, np.int32, np.int32, np.int64)),
                  "cuda events", [])  # fmt: skip
    joined = join(empty, [], np.zeros(0, np.int64), SEGMENTS, [], "cuda:0")
    assert [i.size for i in joined.instances] == [100, 300]
    assert all(i.external for i in joined.instances)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpus_history_has_the_live_bytes_of_the_trace() -> None:
    x = torch.ones(512, 512, device="cuda", requires_grad=True)

    def step() -> None:
        (x @ x).softmax(-1).cumsum(0).sort(0)[0].sum().backward()

    step()
    torch.cuda.reset_peak_memory_stats()
    trace = record(step, device="cuda", history=True)
    trace.check()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    here = trace.where(lambda i: i.device == "cuda:0")
    assert trace.peak(here).bytes == pytest.approx(peak, rel=0.01)
    assert any(i.category == "workspace" and not i.external for i in trace.instances)
