"""What emitted models call to sum over ranks: by kernels, and by torch.distributed elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import pytest
import torch
from ranks import run_ranks
from side_by_side import PROGRAMS, SideBySide
from torch import Tensor

from graphopt.ir import functional
from graphopt.lowering.kernels.triton import reduction_figures
from graphopt.runtime.attention import Extras, Keys
from graphopt.runtime.attention_rows import AttentionRows
from graphopt.runtime.dispatch import by_reference
from graphopt.runtime.peer_memory import on_one_device
from graphopt.runtime.peer_reduce import OneShot, TwoShot, Waiting
from graphopt.runtime.reduction_plan import (
    CausalAttention,
    LinearTiles,
    ReductionFigures,
    plan_attention_linear,
    plan_linear,
)
from graphopt.runtime.reductions import RankReductions
from graphopt.targets import get_target

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SLOW = {"flops": 1e13, "link": 1e9, "push": 1e9, "library": 1e9}
BY_ROWS = {
    **SLOW, "cores": 1, "copy_start": 0.0, "copy_engine": 1e10, "attention_flops": 1e10,
    "least_gain": 0.0,
}  # fmt: skip
"""By which attention is cut into chunks that hide what is sent, however few its heads."""
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def figures(**changes: object) -> ReductionFigures:
    found = reduction_figures(get_target("hopper"))
    assert found is not None
    return dataclasses.replace(found.recorded(), **changes)  # type: ignore[arg-type]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).half().to(DEVICE)


def attention_of(x: Tensor, heads: int) -> AttentionRows:
    """Return an attention of one text whose output is x [S, K]: a token sees itself alone."""
    values = functional.split_heads(x[None], head_dim=x.shape[1] // heads)
    options = {"scale": 1.0, "causal": True, "window": 1}
    return AttentionRows(by_reference, values, Keys(values, values), Extras(), options)


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
        "attention": sums.attention_linear_all_reduce(attention_of(x, heads=2), weight)[0],
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


PLANS = {
    # Figures that make it the best, and for how many tokens.
    "persistent": ({"tiles": (LinearTiles(128, 128, 64, 8, 4, 1e15, 0.0),), "push": 1e15}, 1024),
    "chunks": ({"copy_start": 0.0, "copy_engine": 1e15, **SLOW}, 1024),
    "two-shot": ({"copy_engine": 1.0, "link": 1e15, "signal": 0.0, "programs": PROGRAMS}, 1024),
    "one-shot": ({"one_shot_bytes": 1 << 22, "one_shot": 0.0}, 16),
    "attention": (BY_ROWS, 1024),
}
COLUMNS, DEPTH, HEADS = 1024, 256, 4


@needs_triton
@pytest.mark.parametrize("how", PLANS)
def test_a_plan_is_made_the_best(how: str) -> None:
    """As the next test needs it; and what waits behind a product leaves most of a GPU free."""
    changes, rows = PLANS[how]
    own = figures(**{"tiles": (), "one_shot_bytes": 1, **changes})
    if how == "attention":
        plan = plan_attention_linear(CausalAttention(rows, HEADS), COLUMNS, DEPTH, 2, own)
        assert plan.how == "attention-chunks"
        return
    assert plan_linear(rows, COLUMNS, DEPTH, 2, own).how == how
    (peers,) = on_one_device(1, DEVICE)
    waiting = Waiting(DEVICE, 1, trap=False)
    if how == "one-shot":
        assert OneShot(peers, rows * COLUMNS, waiting)._programs <= PROGRAMS
    elif how == "two-shot":
        half = torch.float16
        made = TwoShot(peers, rows, COLUMNS, half, own.programs, waiting)
        assert made._programs <= PROGRAMS


@pytest.mark.gpu
@pytest.mark.parametrize("how", PLANS)
def test_two_ranks_on_one_gpu(how: str) -> None:
    """Each plan, chosen by figures that make it the best."""
    changes, rows = PLANS[how]
    own = figures(**{"tiles": (), "one_shot_bytes": 1, **changes})
    ranks = SideBySide(2)
    sums = [RankReductions(own, (peers, ranks.waiting)) for peers in on_one_device(2, "cuda")]
    weights = [random(COLUMNS, DEPTH, seed=10 + rank) for rank in range(2)]

    def calls(xs: list[Tensor]) -> list[Callable[[], Tensor]]:
        if how == "attention":
            return [
                lambda own=own, x=x, w=w: own.attention_linear_all_reduce(
                    attention_of(x, HEADS), w
                )[0]
                for own, x, w in zip(sums, xs, weights, strict=True)
            ]
        return [
            lambda own=own, x=x, w=w: own.linear_all_reduce(x, w)
            for own, x, w in zip(sums, xs, weights, strict=True)
        ]

    ranks.warm_up(calls([random(rows, DEPTH, seed=rank) for rank in range(2)]))
    for turn in range(4):
        # Others each turn: nobody takes the sum of the turn before for this one's.
        xs = [random(rows, DEPTH, seed=20 + 2 * turn + rank) for rank in range(2)]
        exact = sum(x.double() @ w.double().t() for x, w in zip(xs, weights, strict=True))
        results = ranks.run(calls(xs))
        eps = torch.finfo(torch.float16).eps
        for got in results:
            assert float((got.double() - exact).norm() / exact.norm()) < 2 * eps
            assert torch.equal(got, results[0])
