"""The model of torch's allocator, and predictions by it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.memory.caching_allocator import Block, CachingAllocator, OutOfMemory
from graphopt.memory.capacity import largest
from graphopt.memory.predict import (
    Prediction,
    added_in_place,
    cublas_workspace,
    predict_peak,
    replay,
)
from graphopt.memory.recording import record
from graphopt.memory.stand_in import StandIn
from graphopt.memory.trace import Trace
from graphopt.memory.workload import Workload

MB = 2**20


def test_sizes_are_rounded_and_cut_from_segments() -> None:
    memory = CachingAllocator()
    for asked, allocated, reserved in (
        (1, 512, 2 * MB),
        (513, 1024, 2 * MB),
        (MB, MB, 2 * MB),
        (MB, MB, 4 * MB),  # what is left of the first segment is too small
        (MB + 1, MB + 512, 24 * MB),
        (10 * MB, 10 * MB, 24 * MB),  # the rest of the segment of 20 MB
        (10 * MB, 10 * MB, 34 * MB),
        (11 * MB + 1, 12 * MB, 46 * MB),  # less than 1 MB is left, and is not cut off
    ):
        before = memory.allocated
        memory.malloc(asked)
        assert (memory.allocated - before, memory.reserved) == (allocated, reserved)


def test_a_request_of_no_bytes_takes_none() -> None:
    memory = CachingAllocator()
    assert memory.malloc(0) is None
    memory.free(None)
    assert memory.reserved == 0


def test_the_smallest_free_block_that_is_large_enough_is_taken() -> None:
    memory = CachingAllocator()
    first, _, second, _ = [memory.malloc(size) for size in (6 * MB, 2 * MB, 4 * MB, 2 * MB)]
    memory.free(first)
    memory.free(second)
    again = memory.malloc(3 * MB)
    assert again is not None and second is not None
    assert again.address == second.address


def test_free_neighbours_become_one() -> None:
    memory = CachingAllocator()
    blocks = [memory.malloc(5 * MB) for _ in range(4)]
    for block in (blocks[0], blocks[2], blocks[1], blocks[3]):
        memory.free(block)
    memory.malloc(19 * MB)  # more than any of them, and a segment of its own were larger
    assert memory.reserved == 20 * MB


def test_at_the_limit_segments_are_given_back_before_a_request_fails() -> None:
    memory = CachingAllocator(limit=40 * MB)
    block = memory.malloc(20 * MB)
    memory.free(block)
    memory.malloc(30 * MB)
    assert (memory.reserved, memory.peak_reserved) == (30 * MB, 30 * MB)
    with pytest.raises(OutOfMemory) as error:
        memory.malloc(12 * MB)
    assert (error.value.asked, error.value.reserved) == (12 * MB, 30 * MB)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 30 * MB), st.booleans()), max_size=60), st.randoms())
def test_blocks_never_overlap_and_bytes_add_up(requests: list[tuple[int, bool]], rnd: Any) -> None:
    memory = CachingAllocator()
    used: list[Block] = []
    for size, free in requests:
        if free and used:
            memory.free(used.pop(rnd.randrange(len(used))))
        block = memory.malloc(size)
        if block is not None:
            assert block.size >= size
            used.append(block)
        assert memory.allocated == sum(b.size for b in used) <= memory.reserved
    places = sorted((b.address, b.address + b.size) for b in used)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(places))
    for block in used:
        memory.free(block)
    memory.release_cached()
    assert (memory.allocated, memory.reserved) == (0, 0)


def matrices(device: torch.device) -> Workload:
    """Return a training step of two matrices of 4 MB."""
    w = nn.Parameter(torch.zeros(1024, 1024, device=device))
    x = torch.zeros(1024, 1024, device=device)

    def step() -> None:
        ((x @ w).relu() @ w).sum().backward()
        w.grad = None

    return Workload("matrices", step, device, lambda: {"weight": {"w": w}, "input": {"x": x}})


@pytest.mark.slow
def test_a_prediction_counts_tensors_and_both_workspaces() -> None:
    found = predict_peak(matrices)
    # The most are alive in the backward pass of the relu: w, x, the relu's result, the gradient of
    # w from the second product, and the gradients behind and in front of the relu.
    tensors = 4 * MB * 6
    assert found.libraries == {"cuBLAS": 32 * MB, "cuBLAS, backward": 32 * MB}
    assert found.allocated == pytest.approx(tensors + 64 * MB, rel=1e-3)
    assert found.live <= found.allocated <= found.reserved
    assert found.fits
    assert predict_peak(matrices, capability=(8, 0)).libraries["cuBLAS"] == cublas_workspace((8, 0))


def test_gradients_are_added_in_place_as_torch_does_unwatched() -> None:
    def make(device: torch.device) -> Workload:
        x = nn.Parameter(torch.zeros(1024, 1024, device=device))
        one, other = (torch.zeros(1024, 1024, device=device) for _ in range(2))

        def step() -> None:
            y = x.exp()
            ((y @ one).sum() + (y @ other).sum()).backward()  # gradients of y from both
            x.grad = None

        tags = {"one": one, "other": other}
        return Workload("used twice", step, device, lambda: {"weight": {"x": x}, "input": tags})

    found = predict_peak(make)
    sums = added_in_place(found.trace)
    ((total, first),) = sums.items()
    assert found.trace.instances[total].size == found.trace.instances[first].size == 4 * MB
    # The most are x, y, both matrices and both gradients of y; watched, the sum of those too.
    workspaces = sum(found.libraries.values())
    assert found.trace.peak().bytes == pytest.approx(7 * 4 * MB, rel=1e-5)
    assert found.live == pytest.approx(6 * 4 * MB + workspaces, rel=1e-5)
    assert found.allocated == pytest.approx(6 * 4 * MB + workspaces, rel=1e-3)


def test_a_prediction_says_what_does_not_fit() -> None:
    found = predict_peak(matrices, limit=70 * MB)
    assert not found.fits
    assert found.short_of is not None
    assert found.short_of.asked == 32 * MB
    with pytest.raises(ValueError, match="between 1 and 0"):
        largest(lambda size: found, 1, most=0)


def test_other_devices_take_nothing_of_the_gpu() -> None:
    def step() -> Tensor:
        return torch.ones(1000) + 1

    found = predict_peak(lambda device: Workload("host", step, device))
    assert (found.allocated, found.reserved) == (0, 0)


def fake_prediction(size: int, need: int, memory: int) -> Prediction:
    trace = Trace([], *(np.zeros(0, t) for t in (np.uint8, np.int32, np.int32, np.int32, np.int64)),
                  "operation index", [])  # fmt: skip
    short = None if need <= memory else OutOfMemory(need, 0)
    return Prediction(need, need, need, {}, {}, short, trace)


@given(
    st.integers(0, 10**6), st.integers(1, 10**5), st.integers(0, 3), st.integers(0, 10**7),
    st.integers(1, 300),
)  # fmt: skip
def test_the_largest_size_is_that_of_a_search_through_all(
    base: int, slope: int, power: int, memory: int, most: int
) -> None:
    def need(size: int) -> int:
        return base + slope * size + size**power

    asked: list[int] = []

    def predict(size: int) -> Prediction:
        asked.append(size)
        return fake_prediction(size, need(size), memory)

    fit = largest(predict, memory, most=most)
    assert fit.value == max((s for s in range(1, most + 1) if need(s) <= memory), default=0)
    assert fit.bounded == (fit.value == most)
    assert fit.prediction.allocated == need(max(fit.value, 1))
    assert len(asked) <= 30


def test_a_stand_in_says_that_it_is_a_gpu_and_leaves_nothing_behind() -> None:
    before = torch.nn.functional.scaled_dot_product_attention
    with StandIn():
        x = torch.ones(2, 3, device="cuda", dtype=torch.float16)
        module = nn.Linear(3, 4).to("cuda", torch.float16)
        for tensor in (x, x.cuda(), x.to("cuda:0"), torch.zeros_like(x), module.weight, module(x)):
            assert tensor.is_cuda
            assert tensor.device == torch.device("cuda", 0)
        weight = module.weight
        module.to("cuda")
        assert module.weight.untyped_storage() is weight.untyped_storage()  # nothing was copied
        host = x.to("cpu")
        assert (host.device.type, host.is_cuda) == ("cpu", False)
        assert host[1:].to("cuda").is_cuda
        assert x.to(torch.float32).is_cuda
    assert torch.nn.functional.scaled_dot_product_attention is before
    assert StandIn.active is None


def test_copies_to_the_host_are_memory_of_the_host() -> None:
    with StandIn():
        x = torch.ones(256, device="cuda")
        kept = []
        trace = record(lambda: kept.append(x.cpu()))
    assert [(i.size, i.device) for i in trace.instances] == [(1024, "cuda:0"), (1024, "cpu")]
    assert replay(trace).allocated == 1024


@pytest.mark.parametrize("named", [StandIn.device, "cuda"])
def test_a_module_that_is_moved_to_the_gpu_is_there(named: Any) -> None:
    with StandIn() as stand_in:
        model = torch.nn.Linear(4, 4).to(named).to(named)
        assert {p.device for p in model.parameters()} == {stand_in.device}
        assert {p.device.type for p in model.to("cpu").parameters()} == {"cpu"}
        assert {p.device for p in model.to(named).parameters()} == {stand_in.device}


def test_autocast_converts_what_it_does_on_a_gpu() -> None:
    with StandIn():
        x = torch.ones(4, 4, device="cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            product = x @ x
            assert product.dtype == torch.bfloat16
            assert product.softmax(-1).dtype == torch.float32
            assert (product + 1).dtype == torch.bfloat16
            w = torch.ones(6, 4, device="cuda")
            trace = record(lambda: nn.functional.linear(x, w))
        finally:
            torch.set_autocast_enabled("cuda", False)
    # A GPU was seen to convert the weight first.
    converted = [i.size for i in trace.instances if "_to_copy" in i.producer]
    assert converted == [6 * 4 * 2, 4 * 4 * 2]
