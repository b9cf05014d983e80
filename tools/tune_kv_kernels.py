"""Compare tiles and launches of the kernels that a step with a KV policy runs, on this GPU.

    python tools/tune_kv_kernels.py --out tiles.json [--pages 16,32,64] [--seconds 220]

The operands, the comparison with torch and the way to measure are those of
`tools/bench_kv_kernels.py`. For each size of a page there are three parts: attention over given
pages by every setting, whole steps of `ema` and `quest` with the best of them, and what every
launch of these steps takes, by the profiler. After each part the results are kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_kv_kernels as bench
from bench_kv_kernels import (
    KEYS,
    PARTS,
    SHARE,
    Decoding,
    PolicyStep,
    Run,
    attention,
    best_dense,
    dense_steps,
    over_allowed,
    paged_spec,
    recorded,
    selecting,
)

from graphopt.lowering.kernels import plan_attention
from graphopt.lowering.kernels.triton import kernel_constants
from graphopt.plan import AttentionPlan
from graphopt.runtime import kv_policy
from graphopt.runtime.attention import Keys, decode
from graphopt.runtime.kernels.decode import attention_decode, attention_merge
from graphopt.targets import get_target

TILES = {
    16: (
        (64, 4, 3, 33), (64, 4, 3, 49), (64, 2, 3, 49), (32, 4, 4, 49), (32, 4, 5, 33),
        (32, 2, 4, 66), (32, 1, 4, 66), (16, 1, 4, 128), (16, 1, 6, 99), (16, 2, 6, 66),
    ),
    32: (
        (32, 4, 3, 49), (32, 4, 4, 33), (32, 4, 5, 33), (32, 4, 4, 49), (32, 4, 4, 66),
        (32, 2, 4, 49), (32, 2, 4, 66), (32, 2, 5, 33), (32, 1, 4, 66), (64, 4, 3, 33),
    ),
    64: (
        (64, 4, 3, 33), (64, 4, 4, 33), (64, 4, 3, 32), (64, 4, 3, 41), (64, 4, 3, 49),
        (64, 4, 3, 66), (64, 2, 3, 33), (64, 4, 2, 66), (64, 8, 3, 33),
    ),
}  # fmt: skip
"""By tokens of a page: BLOCK_N, num_warps, num_stages, SPLITS."""

SELECTIONS = {
    "": {},
    " late": {"EARLY_START": False},
    " 8 pages": {"THREAD_PAGES": 8},
    " 32 pages": {"THREAD_PAGES": 32},
    " 8 KB": {"BOUND_BYTES": 8192},
    " 32 KB": {"BOUND_BYTES": 32768},
}
"""Settings of `graphopt.runtime.kv_policy` beside its own."""


def settings(page: int, first: AttentionPlan) -> dict[str, AttentionPlan]:
    """Return the plans that are compared, by their tiles; the planner's own is the first."""
    plans = {"planned": first}
    for block, warps, stages, splits in TILES[page]:
        tiles = {"BLOCK_N": block, "num_warps": warps, "num_stages": stages, "SPLITS": splits}
        name = f"{block} keys, {warps} warps, {stages} stages, {splits} splits"
        plans[name] = replace(first, tiles={**first.tiles, **tiles, "SPAN": block})
    return plans


def late(plan: AttentionPlan, q: torch.Tensor) -> Callable[[Keys], Any]:
    """Return the attention with kernels that start when the one in front has ended."""
    constants = {**kernel_constants(plan), "OVERLAP": False}
    run = functools.partial(decode, attention_decode, attention_merge, constants=constants)
    return lambda keys: run(q, keys, scale=bench.WIDTH**-0.5)


def launches(steps: list[Run]) -> dict[str, float]:
    """Return what the launches of a step take by the profiler, in microseconds, by kernel."""
    replay = recorded(steps)
    replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / len(steps)
        for event in profile.key_averages()
        if event.self_device_time_total
    }


def compare_tiles(page: int, operands: Decoding, within: Callable[[], bool]) -> dict[str, Any]:
    """Return the times of attention over given pages by every setting, the best one first."""
    machine = get_target("hopper")
    plan = plan_attention(paged_spec(page, selected=True), machine)
    steps, errors = dense_steps(operands, machine), {}
    plans = settings(page, plan)
    for name, one in plans.items():
        if not within():
            print(f"no time for {name} any more", flush=True)
            continue
        try:
            found = over_allowed(operands, one)
        except Exception as error:  # a compiler's own errors: told, and the others go on
            print(f"page {page}: {name}: {type(error).__name__}: {error}", flush=True)
            continue
        errors[name] = max(found.values())
        steps[name] = operands.steps(attention(one, operands.q), selected=True)
    steps["planned, late"] = operands.steps(late(plan, operands.q), selected=True)
    medians = medians_of(steps)
    dense = best_dense(medians)
    ranked = sorted((time, name) for name, time in medians.items() if name in errors)
    for took, name in ranked:
        told = f"{took:7.2f} us  {dense / took:5.2f} times  error {errors[name]:.3f}"
        print(f"page {page:2}  {told}  {name}", flush=True)
    others = {name: round(time, 2) for name, time in medians.items() if name not in errors}
    print(f"page {page:2}  others: {others}", flush=True)
    best = plans[next(name for _, name in ranked if errors[name] <= 1)]
    return {"microseconds": medians, "error_over_allowed": errors, "best": best.tiles}


def compare_selections(
    page: int, operands: Decoding, tiles: dict[str, int], within: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """Yield the times of policies' steps and of their parts, with every setting."""
    machine = get_target("hopper")
    plan = replace(plan_attention(paged_spec(page, selected=True), machine), tiles=tiles)
    attend = attention(plan, operands.q)
    dense = dense_steps(operands, machine)
    for kind in ("ema", "quest"):
        policy = selecting(kind, page, KEYS // page // SHARE)
        own = [PolicyStep.random(policy, attend, operands.q, cache) for cache in operands.caches]
        steps, errors, kept_runs = dict(dense), {}, []
        for name, changed in SELECTIONS.items():
            if not within() or (kind == "ema" and "BOUND_BYTES" in changed):
                continue
            kept = {key: getattr(kv_policy, key) for key in changed}
            for key, value in changed.items():
                setattr(kv_policy, key, value)
            errors["own" + name] = max(own[-1].over_allowed().values())
            # Recorded while the setting holds; what a graph reads has to live as long as it.
            parts = PARTS if not name else ("select",)
            runs = {part + name: [step.part(part) for step in own] for part in parts}
            runs["step" + name] = [step.whole for step in own]
            kept_runs.append(runs)
            steps |= {part: (recorded(each), len(own)) for part, each in runs.items()}
            for key, value in kept.items():
                setattr(kv_policy, key, value)
        medians = medians_of(steps)
        took = {name: round(time, 2) for name, time in medians.items()}
        times = {
            name: round(best_dense(medians) / time, 2)
            for name, time in medians.items()
            if name.startswith("step")
        }
        print(f"page {page:2}  {kind}: {took}", flush=True)
        print(f"page {page:2}  {kind}: times faster {times}, errors {errors}", flush=True)
        each = launches([step.whole for step in own])
        for name, one in sorted(each.items(), key=lambda item: -item[1]):
            print(f"    {one:7.2f} us a step  {name[:90]}", flush=True)
        yield {"policy": kind, "microseconds": medians, "launches": each, "errors": errors}


def medians_of(steps: dict[str, Any]) -> dict[str, float]:
    """Return median times; a step is given as its runs, or as a graph and how many it has."""
    runs = {
        name: own if isinstance(own, tuple) else (recorded(own), len(own))
        for name, own in steps.items()
    }
    times = bench.microseconds(runs, bench.ROUNDS)
    return {name: bench.statistics.median(own) for name, own in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pages", default="64,32,16")
    parser.add_argument("--seconds", type=float, default=220.0)
    args = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(0)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    pages = [int(page) for page in args.pages.split(",")]

    def keep() -> None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for turn, page in enumerate(pages, 1):
        # Two thirds of a page's share for tiles: there are more of them to compile.
        share = args.seconds / len(pages)
        passed = (turn - 1) * share

        def within(limit: float) -> bool:
            return time.perf_counter() - began < limit

        operands = Decoding.random(KEYS, page, SHARE)
        tiles = compare_tiles(page, operands, functools.partial(within, passed + share * 2 / 3))
        result[f"pages of {page}"] = {"tiles": tiles, "policies": []}
        keep()
        for row in compare_selections(
            page, operands, tiles["best"], functools.partial(within, passed + share)
        ):
            result[f"pages of {page}"]["policies"].append(row)
            keep()
        print(f"page {page}: {time.perf_counter() - began:.0f} s so far", flush=True)
        del operands
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
