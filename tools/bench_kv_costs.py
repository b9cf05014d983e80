"""Check the cost model of KV policies on this machine, and measure the figures that it takes.

    python tools/bench_kv_costs.py --out benchmarks/kv_costs.json
    python tools/bench_kv_costs.py --only costs --device cpu --out costs.json

`verdicts` measures ten settings of which the model says whether a policy pays; `costs` the figures
of a target's `[decode]`, on the device at hand.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_kv_kernels as bench
from bench_kv_kernels import (
    GROUPS,
    HEADS,
    SHARE,
    WIDTH,
    Decoding,
    Run,
    best_dense,
    dense_steps,
    measured,
    microseconds,
    policy_steps,
    selecting,
)

from graphopt.ir.functional import attention
from graphopt.ir.kv_policies import KVHeads
from graphopt.plan.kv_policy import step_costs
from graphopt.targets import get_target

SETTINGS = (
    ("ema", 1024, 256), ("ema", 4096, 1024), ("ema", 16384, 1024), ("ema", 131072, 13056),
    ("quest", 4096, 512), ("quest", 32768, 2048), ("quest", 131072, 13056),
    ("sink-local", 32768, 1024), ("snapkv", 1024, 512), ("ema", 65536, 65536),
)  # fmt: skip
"""Policies, tokens of context and of the budget: some pay and some do not."""


def bench_verdicts(target: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each setting: what the cost model says, and what is measured."""
    machine, page = get_target(target), 16
    heads = KVHeads(GROUPS, HEADS, WIDTH, WIDTH, torch.bfloat16)
    for kind, context, budget in SETTINGS:
        operands = Decoding.random(context, page, SHARE)
        policy = selecting(kind, page, budget // page)
        own = policy_steps(policy, operands, machine)
        steps = dense_steps(operands, machine) | {"step": [step.whole for step in own]}
        medians, _ = measured(steps)
        costs = step_costs(policy, heads, context, machine)
        pays = medians["step"] < best_dense(medians)
        yield {
            "policy": kind, "context": context, "budget": budget, "microseconds": medians,
            "predicted_microseconds": {"dense": 1e6 * costs.dense, "step": 1e6 * costs.policy},
            "says_it_pays": costs.worth_it, "pays": pays, "right": costs.worth_it == pays,
            "error_over_allowed": {},
        }  # fmt: skip


def bench_costs(target: str) -> Iterator[dict[str, Any]]:
    """Yield the figures of `[decode]` on the device at hand."""
    short, long = (8192, 131072) if bench.DEVICE == "cuda" else (1024, 4096)
    seconds, moved = [], []
    for keys in (short, long):
        if bench.DEVICE == "cuda":
            operands = Decoding.random(keys, 16, SHARE)
            steps = dense_steps(operands, get_target(target))
            seconds.append(best_dense(measured(steps)[0]) / 1e6)
            moved.append(4 * GROUPS * keys * WIDTH)
        else:
            q, k, v = (torch.randn(1, heads, s, 64) for heads, s in ((9, 1), (3, keys), (3, keys)))
            seconds.append(cpu_seconds(lambda: attention(q, k, v, scale=0.125)))  # noqa: B023
            moved.append(k.nbytes + v.nbytes)
    bandwidth = (moved[1] - moved[0]) / (seconds[1] - seconds[0])
    row = {"bandwidth": bandwidth, "launch": (seconds[0] - moved[0] / bandwidth) / 2}
    if bench.DEVICE == "cuda":
        host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=bench.DEVICE)
        times = microseconds({"copy": (lambda: there.copy_(host, non_blocking=True), 1)}, 5)
        row["host_bandwidth"] = host.numel() / statistics.median(times["copy"]) * 1e6
    else:
        scores = torch.rand(1, 3, 512)
        ops = (lambda: scores * 2, lambda: scores.sort(-1), lambda: scores.amax(-1))
        row["launch"] = statistics.mean(cpu_seconds(op) for op in ops)
        x, weight = torch.randn(3, 16, 6, 512), torch.randn(32, 16, 3, 3)
        taken = cpu_seconds(lambda: F.conv2d(x, weight, padding=1))
        row["flops"] = 2 * weight.numel() * 3 * 6 * 512 / taken
    yield {"figures": row, "error_over_allowed": {}}


def cpu_seconds(run: Run) -> float:
    """Return the median time of a run on the CPU."""
    times = []
    for _ in range(50):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/kv_costs.json"))
    parser.add_argument("--target", default="hopper")
    parser.add_argument("--only", default="verdicts,costs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="of costs")
    args = parser.parse_args()
    bench.DEVICE = args.device
    sections = {
        "verdicts": lambda: bench_verdicts(args.target),
        "costs": lambda: bench_costs(args.target),
    }
    bench.measure(sections, args.only, args.out)


if __name__ == "__main__":
    main()
