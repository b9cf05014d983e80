"""What emitted models call to sum over ranks: by kernels, and by torch.distributed elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from graphopt.ir import functional
from graphopt.lowering.kernels.triton import reduction_figures
from graphopt.runtime.peer_memory import on_one_device
from graphopt.runtime.peer_reduce import Waiting
from graphopt.runtime.reduction_plan import LinearTiles, ReductionFigures
from graphopt.runtime.reductions import RankReductions
from graphopt.targets import get_target

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def figures(**changes: object) -> ReductionFigures:
    found = reduction_figures(get_target("hopper"))
    assert found is not None
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).half().to(DEVICE)


def close(got: Tensor, expected: Tensor) -> None:
    """fp16 products in fp32, rounded once on either side."""
    eps = torch.finfo(torch.float16).eps
    exact = expected.double()
    assert bool(
        ((got.double() - exact).abs() <= 2 * eps * (exact.abs() + exact.abs().mean())).all()
    )


@needs_triton
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bytes_", [1, 1 << 20])
def test_one_rank_alone_computes_its_linear(bytes_: int, bias: bool) -> None:
    """By two shots, and by one, as the plan says; more ranks are in test_all_reduce_kernels.py."""
    (peers,) = on_one_device(1, DEVICE)
    own = figures(one_shot_bytes=bytes_, one_shot=0.0, tiles=(), programs=2, link=1e20)
    sums = RankReductions(own, (peers, Waiting(DEVICE, 1, trap=False)))
    x, weight = random(2, 3, 16), random(24, 16, seed=1)
    offset = random(24, seed=2) if bias else None
    expected = functional.linear(x, weight, offset)
    for _ in range(3):
        got = sums.linear_all_reduce(x, weight, offset)
        assert got.shape == (2, 3, 24)
        close(got, expected)
    # What is not contiguous has the same sum.
    turned = random(4, 6, seed=3).t()
    assert torch.equal(sums.all_reduce(turned), turned)


@needs_triton
def test_what_holds_a_result_is_made_outside_of_a_recording(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (peers,) = on_one_device(1, DEVICE)
    sums = RankReductions(figures(), (peers, Waiting(DEVICE, 1, trap=False)))
    x = random(2, 8)
    expected = x.clone()
    assert torch.equal(sums.all_reduce(x), expected)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    # A shape that was met may be recorded.
    assert torch.equal(sums.all_reduce(x), expected)
    with pytest.raises(RuntimeError, match="run the step once before it is recorded"):
        sums.all_reduce(random(3, 8))


def _sum(rank: int) -> dict[str, Tensor]:
    sums = RankReductions(figures())
    x, weight = random(5, 16, seed=rank), random(8, 16, seed=10 + rank)
    wide = random(5, 16, seed=rank).float()
    return {
        "all_reduce": sums.all_reduce(x.clone()),
        "linear": sums.linear_all_reduce(x, weight),
        "fp32": sums.all_reduce(wide),
        "attention": sums.attention_linear_all_reduce(lambda rows: x[rows], 5, weight),
    }


@pytest.mark.slow
def test_without_gpus_torch_sums() -> None:
    xs = [random(5, 16, seed=rank).cpu() for rank in range(2)]
    weights = [random(8, 16, seed=10 + rank).cpu() for rank in range(2)]
    product = sum(x.double() @ w.double().t() for x, w in zip(xs, weights, strict=True))
    for found in run_ranks(_sum):
        found = {name: value.cpu() for name, value in found.items()}
        close(found["all_reduce"], xs[0] + xs[1])
        assert torch.equal(found["fp32"], xs[0].float() + xs[1].float())
        for name in ("linear", "attention"):
            size = sum(
                (x.double() @ w.double().t()).abs() for x, w in zip(xs, weights, strict=True)
            )
            eps = torch.finfo(torch.float16).eps
            assert bool(((found[name].double() - product).abs() <= 2 * eps * size + 1e-6).all())


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["persistent", "chunks", "two-shot", "one-shot", "attention"])
def test_two_ranks_on_one_gpu(how: str) -> None:
    """Each plan, chosen by figures that make it the best."""
    rows, columns, depth = 1024, 1024, 256
    tiles = (LinearTiles(128, 128, 64, 8, 4, 1e15, 0.0),)
    slow = {"flops": 1e13, "link": 1e9, "push": 1e9, "library": 1e9}
    own = {
        "persistent": figures(tiles=tiles, one_shot_bytes=1, push=1e15),
        "chunks": figures(tiles=(), one_shot_bytes=1, copy_start=0.0, copy_engine=1e15, **slow),
        "two-shot": figures(tiles=(), one_shot_bytes=1, copy_engine=1.0, link=1e15, signal=0.0),
        "one-shot": figures(tiles=(), one_shot_bytes=1 << 22, one_shot=0.0),
        "attention": figures(tiles=(), one_shot_bytes=1, copy_start=0.0, copy_engine=1e15, **slow),
    }[how]
    waiting = Waiting("cuda", 300_000, trap=False)
    sums = [RankReductions(own, (peers, waiting)) for peers in on_one_device(2, "cuda")]
    xs = [random(rows, depth, seed=rank) for rank in range(2)]
    weights = [random(columns, depth, seed=10 + rank) for rank in range(2)]
    exact = sum(x.double() @ w.double().t() for x, w in zip(xs, weights, strict=True))
    streams = [torch.cuda.Stream() for _ in range(2)]
    for turn in range(3):
        results = []
        for rank, stream in enumerate(streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                if how == "attention":
                    got = sums[rank].attention_linear_all_reduce(
                        xs[rank].__getitem__, rows, weights[rank]
                    )
                else:
                    got = sums[rank].linear_all_reduce(xs[rank], weights[rank])
                results.append(got)
        torch.cuda.synchronize()
        if turn == 0:
            # Kernels are loaded, for which one may wait that waits for a rank.
            waiting.late.zero_()
            continue
        assert not waiting.late.item()
        eps = torch.finfo(torch.float16).eps
        for got in results:
            assert float((got.double() - exact).norm() / exact.norm()) < 2 * eps
            assert torch.equal(got, results[0])
