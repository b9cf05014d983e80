"""Linears summed over two Ascend devices: the plan, its schedule, and the kernel interpreted."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import LoweringError
from graphopt.lowering.kernels.ascend_triton import sum_sources
from graphopt.plan.ascend_sums import (
    NpuFigures,
    plan_ascend_sum,
    simulate_ascend_sum,
    sum_inequalities,
)
from graphopt.targets import get_target

TARGET = get_target("ascend910b")
# Of no particular part: rates that make computing and sending alike.
FIGURES = NpuFigures(cores=24, flops=300e12, link=28e9, signal=10e-6)
SHAPES = [(1024, 4096, 4096), (4096, 8192, 4096), (16384, 8192, 14336), (200, 136, 72)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_fits_and_its_schedule_is_no_longer_than_predicted(shape):
    plan = plan_ascend_sum(*shape, TARGET, FIGURES)
    assert all(inequality.holds for inequality in plan.inequalities)
    assert sum(plan.stages) == plan.share and 2 * plan.share >= plan.tile_count
    schedule = simulate_ascend_sum(plan, FIGURES)
    # Devices don't wait for the link before they go on, where the formula's stages do.
    assert 0.7 * plan.seconds <= schedule.seconds <= plan.seconds + 1e-9
    assert schedule.seconds <= plan.apart + 2 * FIGURES.signal
    if shape[0] >= 1024:
        assert plan.seconds < plan.apart
        assert schedule.overlap(0) > 0 and schedule.overlap(1) > 0


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 40),
    st.floats(1e12, 1e15), st.floats(1e9, 1e12),
)  # fmt: skip
def test_launches_take_every_tile_once(rows, columns, depth, cores, flops, link):
    figures = NpuFigures(cores, flops, link, 1e-5)
    plan = plan_ascend_sum(rows, columns, depth, TARGET, figures)
    for rank in range(2):
        taken = [
            (tile, launch["ADD"])
            for launch in plan.launches(rank)
            for tile in range(launch["first"], launch["first"] + launch["count"])
        ]
        mine = {tile for tile, add in taken if add}
        assert sorted(tile for tile, _ in taken) == list(range(plan.tile_count))
        assert mine == {t for t in range(plan.tile_count) if t // plan.share == rank}


def test_tiles_are_limited_by_the_memories_of_the_target():
    tiles = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128}
    limits = {i.name: i for i in sum_inequalities(TARGET, tiles, "f16")}
    assert limits["L0C"].value == limits["L0C"].limit == 131072
    assert limits["L1"].value == (128 + 256) * 128 * 2
    assert limits["unified buffer"].value == 163840
    plan = plan_ascend_sum(4096, 8192, 4096, TARGET, FIGURES)
    (held,) = (i.value for i in plan.inequalities if i.name == "L1")
    assert 2 * held <= limits["L1"].limit  # two slots
    small = tuple(dataclasses.replace(m, bytes=64) for m in TARGET.memories)
    with pytest.raises(LoweringError, match=r"No tiles of a linear fit .*L0C"):
        plan_ascend_sum(64, 64, 64, dataclasses.replace(TARGET, memories=small), FIGURES)
    with pytest.raises(LoweringError, match="not of f32"):
        plan_ascend_sum(64, 64, 64, TARGET, FIGURES, "f32")


def test_the_source_has_its_plan_at_its_head():
    plan = plan_ascend_sum(1024, 4096, 4096, TARGET, FIGURES)
    (text,) = sum_sources(plan).values()
    ast.parse(text)
    assert text.startswith("# linear     1024 tokens, 4096 features to 4096, summed over 2 devices")
    assert "# limit      L0C: " in text and "# rank 1: [{'first': 0," in text
    assert "def ascend_linear_all_reduce(" in text and "graphopt" not in text.split('"""')[2]


@pytest.mark.ascend
@pytest.mark.slow
def test_the_compiler_agrees_with_the_planner(tmp_path):
    """See tests/lowering/test_ascend_attention.py for what this needs."""
    path = Path(__file__).resolve().parents[2] / "tools" / "check_ascend.py"
    spec = importlib.util.spec_from_file_location("check_ascend", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    folder = Path(os.environ.get("GRAPHOPT_ASCEND_VENV") or tool.default_venv())
    if not tool.is_ready(folder):
        pytest.skip(f"there is no triton-ascend in {folder}: run python tools/check_ascend.py once")
    for row in tool.compare_sums(folder, tool.SUM_TILES[::7], tmp_path):
        assert row["agree"], row
        assert row.get("compiler_ub_bytes", row["planner_ub_bytes"]) == row["planner_ub_bytes"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("rows", "columns", "depth"), [(70, 40, 48), (64, 96, 40), (1, 8, 16)])
def test_launches_of_both_ranks_make_the_sum(rows, columns, depth):
    from graphopt.runtime.kernels.ascend_linear_all_reduce import ascend_linear_all_reduce

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = plan_ascend_sum(rows, columns, depth, TARGET, dataclasses.replace(FIGURES, cores=2))
    small = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}
    count = -(-rows // 32) * -(-columns // 32)
    share = -(-count // 2)
    plan = dataclasses.replace(
        plan, tiles=small, share=share, stages=(share - share // 2, share // 2)
    )
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).half().to(device)

    xs = [random(rows, depth) for _ in range(2)]
    weights = [random(columns, depth) for _ in range(2)]
    boxes, outs = (
        [torch.full(shape, float("nan"), dtype=torch.float16, device=device) for _ in range(2)]
        for shape in ((share, 32, 32), (rows, columns))
    )
    # What the ranks do for each other comes before what they do for themselves.
    for number in range(2 * len(plan.stages)):
        for rank in range(2):
            launch = plan.launches(rank)[number]
            if launch["count"] == 0:
                continue
            own = launch["ADD"]
            ascend_linear_all_reduce[(2,)](
                xs[rank], weights[rank], boxes[rank if own else 1 - rank], outs[rank],
                outs[1 - rank], rows, columns, depth, launch["first"], launch["count"],
                launch["boxed"], **small, ADD=own,
            )  # fmt: skip
    exact = sum(x.double() @ w.double().t() for x, w in zip(xs, weights, strict=True))
    size = sum((x.double() @ w.double().t()).abs() for x, w in zip(xs, weights, strict=True))
    eps = torch.finfo(torch.float16).eps
    for out in outs:
        # One rounding of what was sent, and one of the sum.
        assert bool(((out.double() - exact).abs() <= 2 * eps * size + 1e-6).all())
        assert torch.equal(out, outs[0])
