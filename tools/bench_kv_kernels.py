"""Measure decoding over pages that a KV policy selects, on this GPU, beside dense attention.

    python tools/bench_kv_kernels.py --out benchmarks/kv_kernels.json
    python tools/bench_kv_kernels.py --only decode --tune --out tiles.json

Random tensors of one text's shape: 32 query heads over 8 key heads of 128, 131,072 keys. Steps are
recorded as CUDA graphs; what is compared is measured in turns. Each step reads another of several
caches and lists of pages, which together are larger than what stays on the chip. Everything that
is measured is compared with torch first, in fp64; the run ends with exit status 1 where one is off.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphopt.lowering.kernels import get_family, plan_attention
from graphopt.plan import AttentionPlan, AttentionSpec
from graphopt.runtime.attention import Keys
from graphopt.targets import get_target

HEADS, GROUPS, WIDTH = 32, 8, 128
KEYS, SHARE = 131072, 10  # a tenth of the pages
PAGES = (16, 32, 64)
CACHES, LISTS = 3, 4
ROUNDS = 15
DEVICE = "cuda"
BF16 = 2.0**-8
"""Unit roundoff."""

Run = Callable[[], Any]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def recorded(steps: list[Run]) -> Run:
    """Return the replay of one CUDA graph of several steps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph.replay


def microseconds(runs: Mapping[str, tuple[Run, int]], rounds: int) -> dict[str, list[float]]:
    """Return the times of a step of every run, taken in turns.

    Args:
        runs: What replays a graph, and how many steps it has.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, (replay, steps) in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            replay()
            start.record()
            replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(1000 * start.elapsed_time(end) / steps)
    return times


# Operands -----------------------------------------------------------------------------------------


@dataclass
class Decoding:
    """One step's operands: queries, several caches as pages, and lists of pages to read."""

    page: int
    q: Tensor
    caches: list[Keys]
    lists: list[Tensor]

    @classmethod
    def random(cls, keys: int, page: int, share: int) -> Decoding:
        """Return random operands of so many keys, of which a step reads one page in `share`."""
        pages = keys // page
        caches = []
        for _ in range(CACHES):
            # As a decoder lays them out; of one text the order of the pool is that of the text.
            table = torch.arange(pages, dtype=torch.int32, device=DEVICE)[None]
            k, v = (random(pages, GROUPS, page, WIDTH) for _ in range(2))
            lens = torch.full((1,), keys, dtype=torch.int32, device=DEVICE)
            caches.append(Keys(k, v, kv_lens=lens, block_table=table))
        return cls(page, random(1, HEADS, 1, WIDTH), caches, [
            random_pages(pages, pages // share) for _ in range(LISTS)
        ])  # fmt: skip

    def contiguous(self, cache: Keys) -> tuple[Tensor, Tensor]:
        """Return keys and values [1, G, T, D]."""
        return tuple(x.transpose(0, 1).reshape(1, GROUPS, -1, WIDTH) for x in (cache.k, cache.v))  # type: ignore[return-value]

    def steps(self, attend: Callable[[Keys], Any], *, selected: bool) -> list[Run]:
        """Return a step for every cache, and where pages are selected for every list of each."""
        return [
            functools.partial(attend, replace(cache, selected_blocks=pages))
            for pages in (self.lists if selected else [None])
            for cache in self.caches
        ]


def random_pages(pages: int, read: int) -> Tensor:
    """Return int64 [1, G, read]: the first page, the last two, and random others, ascending."""
    rows = []
    for _ in range(GROUPS):
        others = torch.randperm(pages - 3, device=DEVICE)[: read - 3] + 1
        ends = torch.tensor([0, pages - 2, pages - 1], device=DEVICE)
        rows.append(torch.cat((others, ends)).sort().values)
    return torch.stack(rows)[None]


def paged_spec(page: int, *, selected: bool) -> AttentionSpec:
    return AttentionSpec(
        head_dim=WIDTH, heads=HEADS, kv_heads=GROUPS, dtype="bf16", phase="decode", kv="paged",
        page=page, kv_lens=True, selected_blocks=selected, lse=selected, page_max=selected,
    )  # fmt: skip


def attention(plan: AttentionPlan, q: Tensor) -> Callable[[Keys], Any]:
    run = get_family(plan.kernel).load(plan)
    return lambda keys: run(q, keys, scale=WIDTH**-0.5)


# Comparing ----------------------------------------------------------------------------------------


def over_allowed(operands: Decoding, plan: AttentionPlan) -> dict[str, float]:
    """Return the largest error of each result over what is allowed; above 1 it is wrong.

    Weights and the output are rounded to bf16: 2 u sum p |v|. A score is a sum of D products in
    fp32, whose error is below D roundings of sum |q k|.
    """
    cache, pages = operands.caches[-1], operands.lists[-1]
    keys = replace(cache, selected_blocks=pages)
    out, lse, page_max = attention(plan, operands.q)(keys)
    heads = torch.arange(GROUPS, device=DEVICE)[:, None]
    k, v = (x[pages[0], heads].double() for x in (cache.k, cache.v))  # [G, M, page, D]
    q = operands.q.double().view(GROUPS, HEADS // GROUPS, WIDTH)
    scores = torch.einsum("ghd,gmpd->ghmp", q, k) * WIDTH**-0.5
    sizes = torch.einsum("ghd,gmpd->ghmp", q.abs(), k.abs()).amax() * WIDTH**-0.5
    exact_lse = scores.flatten(2).logsumexp(-1)
    p = (scores - exact_lse[..., None, None]).exp()
    exact, mass = (torch.einsum("ghmp,gmpd->ghd", p, x) for x in (v, v.abs()))
    rounding = WIDTH * torch.finfo(torch.float32).eps * float(sizes)

    def worst(found: Tensor, expected: Tensor, allowed: Tensor | float) -> float:
        return float(((found.double().view(expected.shape) - expected).abs() / allowed).max())

    return {
        "out": worst(out, exact, 2 * BF16 * mass + 1e-9),
        "lse": worst(lse, exact_lse, rounding),
        "page_max": worst(page_max, scores.amax(-1), rounding),
    }


# Decode -------------------------------------------------------------------------------------------


def peer(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Run:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def bench_decode(target: str, tune: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each size of a page: dense kernels, and the one over selected pages."""
    machine = get_target(target)
    for page in PAGES[: 1 if tune else None]:
        operands = Decoding.random(KEYS, page, SHARE)
        q = operands.q
        dense = [operands.contiguous(cache) for cache in operands.caches]
        contiguous = AttentionSpec(
            head_dim=WIDTH, heads=HEADS, kv_heads=GROUPS, dtype="bf16", phase="decode"
        )
        run_dense = attention(plan_attention(contiguous, machine), q)
        steps: dict[str, list[Run]] = {
            "dense": [functools.partial(run_dense, Keys(k, v)) for k, v in dense],
            "dense FA2": [peer(SDPBackend.FLASH_ATTENTION, q, k, v) for k, v in dense],
            "dense cuDNN": [peer(SDPBackend.CUDNN_ATTENTION, q, k, v) for k, v in dense],
            "dense paged": operands.steps(
                attention(plan_attention(paged_spec(page, selected=False), machine), q),
                selected=False,
            ),
        }
        plan = plan_attention(paged_spec(page, selected=True), machine)
        plans = {"selected": plan}
        if tune:
            steps = {"dense": steps["dense"]}
            plans |= {str(tiles): replace(plan, tiles=tiles) for tiles in tilings(plan.tiles)}
        errors = {}
        for name, one in plans.items():
            errors[name] = over_allowed(operands, one)
            steps[name] = operands.steps(attention(one, q), selected=True)
        graphs = {name: (recorded(own), len(own)) for name, own in steps.items()}
        times = microseconds(graphs, ROUNDS)
        medians = {name: statistics.median(own) for name, own in times.items()}
        best_dense = min(time for name, time in medians.items() if name.startswith("dense"))
        read = operands.lists[0].shape[2] * page
        yield {
            "page": page, "keys": KEYS, "keys_read": read, "tiles": plan.tiles,
            "bytes_read": 4 * GROUPS * read * WIDTH,
            "microseconds": medians, "all_microseconds": times,
            "times_faster": {n: best_dense / medians[n] for n in plans},
            "error_over_allowed": errors,
        }  # fmt: skip


def tilings(tiles: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Yield tiles worth a try for lists of pages."""
    for block, stages, splits in (
        (32, 3, 33), (32, 4, 33), (32, 4, 16), (64, 3, 16), (64, 4, 33), (64, 4, 16),
        (64, 2, 33), (128, 3, 16), (128, 2, 16), (32, 4, 49),
    ):  # fmt: skip
        yield {**tiles, "BLOCK_N": block, "num_stages": stages, "SPLITS": splits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/kv_kernels.json"))
    parser.add_argument("--target", default="hopper")
    parser.add_argument("--only", default="decode", help="of decode, by commas")
    parser.add_argument("--tune", action="store_true", help="measure other tiles as well")
    args = parser.parse_args()
    torch.manual_seed(0)
    sections: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "decode": lambda: bench_decode(args.target, args.tune),
    }
    result: dict[str, Any] = {
        "command": "python tools/bench_kv_kernels.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {name: metadata.version(name) for name in ("torch", "triton")},
    }
    wrong = 0.0
    for name in args.only.split(","):
        result[name] = []
        for row in sections[name]():
            result[name].append(row)
            print(name, json.dumps({k: v for k, v in row.items() if k != "all_microseconds"}))
            errors = [e for own in row["error_over_allowed"].values() for e in own.values()]
            wrong = max([wrong, *errors])
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not wrong <= 1:
        sys.exit(f"a result is {wrong:.1f} times as far off as it may be")


if __name__ == "__main__":
    main()
