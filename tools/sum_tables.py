"""The tables of sums over ranks: as planned, and as measured on two GPUs."""

from __future__ import annotations

import tomllib
from typing import Any

from results import ROOT, markdown_table, measured_on, median, result_of

from graphopt.runtime.reduction_plan import (
    CausalAttention,
    LinearTiles,
    ReductionFigures,
    plan_attention_linear,
    plan_linear,
    product_seconds,
)

SHAPES = [
    (1024, 4096, 8192), (4096, 4096, 8192), (16384, 4096, 8192), (1024, 14336, 8192),
    (4096, 14336, 8192), (16384, 14336, 8192), (1024, 2048, 4096), (4096, 2048, 4096),
    (16384, 2048, 4096),
]  # fmt: skip
"""M tokens, K inputs of each rank, N outputs."""
PLANNED = "ours, as planned"
"""What the bench calls the way that a model would go."""


def _figures() -> ReductionFigures:
    path = ROOT / "graphopt" / "targets" / "hopper.toml"
    file = tomllib.loads(path.read_text(encoding="utf-8"))
    table = {**file["reductions"], "cores": file["cores"]}
    table["tiles"] = tuple(LinearTiles(**row) for row in table["tiles"])
    return ReductionFigures(**table).recorded()


def sums_predicted() -> str:
    """What plans of linears that two GPUs sum are predicted to take."""
    figures = _figures()
    rows = []
    for tokens, depth, outputs in SHAPES:
        plan = plan_linear(tokens, outputs, depth, 2, figures)
        library = plan.others["library"]
        assert isinstance(library, float)
        cut = f"chunks of {'+'.join(map(str, plan.chunks))}" if plan.chunks else plan.how
        if plan.tiles:
            cut = f"persistent, tiles of {plan.tiles.rows} x {plan.tiles.columns}"
        rows.append(
            [
                f"{tokens:,}, {depth:,}, {outputs:,}",
                f"{1e6 * product_seconds(tokens, outputs, depth, figures):,.0f}",
                f"{1e6 * library:,.0f}",
                cut,
                f"{1e6 * plan.seconds:,.0f}",
                f"{library / plan.seconds:.2f}",
            ]
        )
    head = ["M, K, N", "product", "then NCCL", "plan", "predicted", "times as fast"]
    return markdown_table(head, rows)


def sums_of_attention_predicted() -> str:
    """What attention, its projection and the sum are predicted to take, whole and in chunks."""
    figures = _figures()
    rows = []
    for heads, outputs in ((16, 4096), (32, 8192)):
        for tokens in (4096, 8192, 16384, 32768):
            depth = heads * 128
            plan = plan_attention_linear(CausalAttention(tokens, heads), outputs, depth, 2, figures)
            (other,) = plan.others.values()
            assert isinstance(other, float)
            in_chunks = plan.how == "attention-chunks"
            whole, cut = (other, plan.seconds) if in_chunks else (plan.seconds, other)
            behind = next(iter(plan.others)).removeprefix("attention, then ")
            rows.append(
                [
                    f"{tokens:,}, {heads}, {outputs:,}",
                    f"{1e6 * whole:,.0f}, {behind if in_chunks else plan.how}",
                    f"{1e6 * cut:,.0f}",
                    "in chunks" if in_chunks else "whole",
                ]
            )
    head = ["tokens, heads, N", "attention whole, then", "in chunks", "plan"]
    return markdown_table(head, rows)


def _rows(part: str) -> list[dict[str, Any]]:
    return [row for row in result_of("all_reduce").get("rows", []) if row["part"] == part]


def sums() -> str:
    """Linears summed over two GPUs, as measured."""
    by_shape = {tuple(row["shape"]): row for row in _rows("linear")}
    if not by_shape:
        return "Not measured yet."
    rows = []
    for shape in SHAPES:
        if shape not in by_shape:
            continue
        row = by_shape[shape]
        times = {name: median(found["microseconds"]) for name, found in row["times"].items()}
        # A run that tries all there is has no plan's own time in it.
        every = {name: value for name, value in times.items() if name.startswith("ours")}
        name = PLANNED if PLANNED in every else min(every, key=lambda one: every[one])
        ours = every[name]
        by = row["planned"] if name == PLANNED else name.split()[1]
        alone = min(times[name] for name in ("NCCL", "two-shot", "our two-shot"))
        hidden = (times["GEMM"] + alone - ours) / min(times["GEMM"], alone)
        names = ("GEMM", "GEMM, NCCL", "GEMM, two-shot", "fused_matmul_reduce_scatter")
        rows.append(
            [
                ", ".join(f"{size:,}" for size in shape),
                *(f"{times[name]:,.0f}" for name in names),
                f"{ours:,.0f}",
                by,
                f"{times['GEMM, NCCL'] / ours:.2f}",
                f"{hidden:.0%}",
            ]
        )
    head = [
        "M, K, N", "product", "then NCCL", "then torch's two-shot", "fused_matmul_reduce_scatter",
        "ours", "by", "times as fast as with NCCL", "hidden",
    ]  # fmt: skip
    told = measured_on(result_of("all_reduce"), "torch", "triton")
    return f"{markdown_table(head, rows)}\n\n{told}"


def sums_of_few() -> str:
    """Sums of few bytes over two GPUs."""

    def told(row: dict[str, Any], name: str) -> str:
        found = row["times"].get(name)
        return "-" if found is None else f"{median(found['microseconds']):.1f}"

    names = ("NCCL", "one_shot_all_reduce", "ours one-shot", "ours two-shot")
    rows = [
        [f"{row['bytes'] // 1024:,} KB", *(told(row, name) for name in names)]
        for row in _rows("decode")
    ]
    head = ["sum of", "NCCL", "torch's one-shot", "ours, one-shot", "ours, two-shot"]
    return markdown_table(head, rows) if rows else "Not measured yet."


def sums_of_attention() -> str:
    """Attention, its output projection and the sum over two GPUs."""
    rows = []
    for row in _rows("attention"):
        times = {name: median(found["microseconds"]) for name, found in row["times"].items()}
        ours, nccl = times[PLANNED], times["attention, GEMM, NCCL"]
        rows.append(
            [
                f"{row['shape'][0]:,}",
                f"{times['attention']:,.0f}",
                f"{times['our attention']:,.0f}",
                f"{times['attention, GEMM']:,.0f}",
                f"{nccl:,.0f}",
                f"{times['attention, GEMM, two-shot']:,.0f}",
                f"{ours:,.0f}",
                row["planned"],
                f"{nccl / ours:.2f}",
            ]
        )
    head = [
        "tokens", "torch's attention", "ours", "torch's and product", "then NCCL",
        "then torch's two-shot", "ours, all of it", "by", "times as fast as with NCCL",
    ]  # fmt: skip
    return markdown_table(head, rows) if rows else "Not measured yet."
