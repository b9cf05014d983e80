"""Measure sums over GPUs of one host, and row-parallel linears with the sum of their results.

    python tools/bench_all_reduce.py [--parts linear,decode,attention] [--tune] [--out FILE]

It starts a process for each GPU by torchrun, two unless `--ranks` says otherwise. Parts:

* `linear`: [M, K] by [K, N], each rank with its K, at nine shapes: a product and NCCL's all-reduce,
  a product and torch's two-shot kernel, torch's `fused_matmul_reduce_scatter` with the gather
  behind it, and ours: every plan, and the one that the planner takes;
* `decode`: sums of 8 KB to 1 MB, as a step of one text has them;
* `attention`: attention, its output projection and the sum, at 4K and 16K tokens.

Each result is compared with a sum in fp32 before it is timed; runs are recorded in CUDA graphs,
where they can be, and made in turns. `--tune` tries other tiles of the persistent kernel than the
target's, and other chunks. `--seconds` is how long a part may begin something new. What ranks say
in errors begins with their number.

NVLink multicast stays off: nothing here uses it, and NCCL and torch are told so.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import target_here

from graphopt.lowering.kernels import get_family, plan_attention
from graphopt.lowering.kernels.triton import reduction_figures
from graphopt.plan import AttentionSpec
from graphopt.runtime.attention import Extras, Keys
from graphopt.runtime.attention_rows import AttentionRows
from graphopt.runtime.peer_linear import ChunkedLinear, PersistentLinear, SummedLinear
from graphopt.runtime.peer_memory import Peers, on_one_device, peers_of, why_out_of_reach
from graphopt.runtime.peer_reduce import OneShot, TwoShot, Waiting
from graphopt.runtime.reduction_plan import (
    CausalAttention,
    LinearTiles,
    ReductionFigures,
    chunkings,
    plan_attention_linear,
    plan_linear,
)
from graphopt.runtime.reductions import RankReductions
from graphopt.support.recorded import record
from graphopt.targets import get_target

SHAPES = [
    (1024, 4096, 8192), (4096, 14336, 8192), (4096, 4096, 8192), (1024, 14336, 8192),
    (16384, 4096, 8192), (4096, 2048, 4096), (16384, 14336, 8192), (1024, 2048, 4096),
    (16384, 2048, 4096),
]  # fmt: skip
"""M, K of each rank, N: what matters most first."""


def _tiles(
    rows: int, columns: int, depth: int, warps: int, stages: int, *, programs: int = 1
) -> LinearTiles:
    return LinearTiles(rows, columns, depth, warps, stages, 1.0, 0.0, 16, programs)


TILES = {
    "128x256x64": _tiles(128, 256, 64, 8, 3),
    "128x128x64": _tiles(128, 128, 64, 8, 4),
    "128x128x64, 5 stages": _tiles(128, 128, 64, 8, 5),
    "64x256x64": _tiles(64, 256, 64, 8, 4),
}
"""That `--tune` tries; with copy engines of the cores, but for those of `STORES`."""
STORES = {"128x128x64, 2 a core, stores": _tiles(128, 128, 64, 4, 3, programs=2)}
PLANNED = "ours, as planned"
TURNS, PER = 7, 3
PATIENCE = 3_000_000
"""Looks at a signal until a kernel gives up: some seconds."""
DTYPE = torch.bfloat16
Run = Callable[[], Any]


class Bench:
    """What the parts have in common: ranks, checks, times, and what is kept."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl", timeout=datetime.timedelta(seconds=60), device_id=self.device
        )
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.messages = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=60))
        group = dist.group.WORLD
        assert group is not None
        reason = why_out_of_reach(group)
        if reason is not None:
            raise SystemExit(f"the GPUs do not reach each other: {reason}")
        self.group = group
        self.peers: Peers = peers_of(group, self.device)
        self.waiting = Waiting(self.device, PATIENCE, trap=False)
        figures = reduction_figures(get_target("hopper"))
        assert figures is not None
        self.figures: ReductionFigures = figures.recorded()
        self.cores = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.results: dict[str, Any] = {
            "command": "python tools/bench_all_reduce.py " + " ".join(_told(sys.argv[1:])),
            "date": datetime.date.today().isoformat(),
            "device": f"{self.ranks} x {torch.cuda.get_device_name(self.device)}",
            "versions": {name: metadata.version(name) for name in ("torch", "triton")},
            "rows": [],
        }
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def over(self) -> bool:
        """Return, alike on all ranks, whether the time for beginning something new is over."""
        flag = [time.monotonic() - self.began > self.arguments.seconds]
        dist.broadcast_object_list(flag, src=0, group=self.messages)
        return flag[0]

    def keep(self, row: dict[str, Any]) -> None:
        self.results["rows"].append(row)
        if self.rank == 0 and self.arguments.out is not None:
            self.arguments.out.parent.mkdir(parents=True, exist_ok=True)
            self.arguments.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def random(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1000 * seed + self.rank)
        values = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return (values * scale).to(DTYPE)

    def agree(self, error: str | None) -> str | None:
        """Return the first error of any rank, on all of them."""
        errors: list[str | None] = [None] * self.ranks
        dist.all_gather_object(errors, error, group=self.messages)
        found = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
        return found[0] if found else None

    def right(self, make: Callable[[], Run], check: Callable[[Any], str | None]) -> Run | str:
        """Return what `make` makes, once its results are right on all ranks; or what is wrong.

        The first run is not: one rank may give up waiting for another that still compiles. Then
        several are, since places of results take turns.
        """
        run: Run | None = None
        error: str | None = None
        try:
            run = make()
        except Exception as problem:
            error = f"{type(problem).__name__}: {str(problem)[:300]}"
            if self.arguments.verbose:
                traceback.print_exc()
        error = self.agree(error)
        for checked in (False, True, True, True, True):
            if error is not None:
                return error
            assert run is not None
            try:
                self.waiting.late.zero_()
                result = run()
                torch.cuda.synchronize()
                if checked:
                    error = "gave up waiting" if self.waiting.late.item() else check(result)
            except Exception as problem:
                error = f"{type(problem).__name__}: {str(problem)[:300]}"
                if self.arguments.verbose:
                    traceback.print_exc()
            error = self.agree(error)
        assert run is not None
        return error or run

    def recorded(self, run: Run, per: int) -> tuple[Run, bool]:
        """Return `per` runs as one CUDA graph, or as they are where that fails; and which."""
        graph, error = None, None

        def again() -> None:
            for _ in range(per):
                run()

        try:
            graph, _ = record(again, runs=0)
        except Exception as problem:
            error = f"{type(problem).__name__}: {str(problem)[:200]}"
        torch.cuda.synchronize()
        if self.agree(error) is None:
            assert graph is not None
            return graph.replay, True
        return again, False

    def times(self, runs: dict[str, Run], per: int) -> dict[str, dict[str, Any]]:
        """Return microseconds of each run, the slowest rank's of every turn."""
        made = {name: self.recorded(run, per) for name, run in runs.items()}
        counts: dict[str, int] = {}
        for name, (run, _) in made.items():
            run()
            spent = [self._timed(run, 1) / 1e3]
            dist.broadcast_object_list(spent, src=0, group=self.messages)
            counts[name] = max(1, min(20, int(6 / max(spent[0], 0.05))))
        found: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(TURNS):
            for name in list(runs)[:: -1 if turn % 2 else 1]:
                found[name].append(self._timed(made[name][0], counts[name]) / per)
        every: list[Any] = [None] * self.ranks
        dist.all_gather_object(every, found, group=self.messages)
        return {
            name: {
                "microseconds": [
                    max(turn) for turn in zip(*(one[name] for one in every), strict=True)
                ],
                "graph": made[name][1],
            }
            for name in runs
        }

    def _timed(self, run: Run, count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier(self.group)
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / count


def _told(given: Sequence[str]) -> list[str]:
    """Return the arguments without where results go."""
    at = given.index("--out") if "--out" in given else len(given)
    return [*given[:at], *given[at + 2 :]]


def median(row: dict[str, Any]) -> float:
    return statistics.median(row["microseconds"])


def linear_part(bench: Bench) -> None:
    ways = bench.arguments.ways.split(",")
    rows = []
    for shape in SHAPES[: bench.arguments.shapes]:
        if bench.over():
            bench.say(f"left out for want of time: {shape} and what follows")
            break
        rows.append(_linear(bench, shape, ways))
        bench.keep(rows[-1])
        bench.say(_line(rows[-1]))
    bench.say(
        "\nM, K, N: GEMM, NCCL | GEMM, two-shot | fused | ours | times faster than NCCL | hidden"
    )
    for row in rows:
        bench.say(_summary(row))


def _linear(bench: Bench, shape: tuple[int, int, int], ways: Sequence[str]) -> dict[str, Any]:
    rows, depth, columns = shape
    x = bench.random(rows, depth, seed=1)
    weight = bench.random(columns, depth, seed=2, scale=depth**-0.5)
    exact = torch.empty(rows, columns, dtype=torch.float32, device=bench.device)
    for part in range(0, rows, 4096):
        exact[part : part + 4096] = x[part : part + 4096].float() @ weight.float().t()
    dist.all_reduce(exact)
    size = exact.norm()

    def check(result: Any) -> str | None:
        error = float((result.float() - exact).norm() / size)
        same = result.view(torch.int16).to(torch.int64).sum()
        sums = [torch.empty_like(same) for _ in range(bench.ranks)]
        dist.all_gather(sums, same)
        result.fill_(float("nan"))
        if not error < 5e-3:
            return f"off by {error:.2g}"
        if any(bool(other != same) for other in sums):
            return "not the same on all ranks"
        return None

    runs: dict[str, Run] = {}
    wrong: dict[str, str] = {}
    candidates: dict[str, Callable[[], Run]] = {}
    if "others" in ways:
        candidates |= _others(bench, x, weight)
    candidates |= _ours(bench, x, weight, ways)
    for name, make in candidates.items():
        made = bench.right(make, check)
        if isinstance(made, str):
            wrong[name] = made
            bench.say(f"{shape} {name}: {made}")
        else:
            runs[name] = made
    product = torch.empty(rows, columns, dtype=DTYPE, device=bench.device)
    runs["GEMM"] = lambda: torch.mm(x, weight.t(), out=product)
    if "others" in ways:
        summed = torch.empty(rows, columns, dtype=DTYPE, device=bench.device)
        runs["NCCL"] = lambda: dist.all_reduce(summed)
        held = torch.ops.symm_mem.two_shot_all_reduce_
        buffer = _symmetric(bench, rows, columns)
        runs["two-shot"] = lambda: held(buffer, "sum", bench.group.group_name)
        alone = TwoShot(bench.peers, rows, columns, DTYPE, 2 * bench.cores, bench.waiting)
        runs["our two-shot"] = lambda: alone(rows)
    if "persistent" in ways:
        runs |= _products_alone(bench, x, weight)
    times = bench.times(runs, PER)
    plan = plan_linear(rows, columns, depth, bench.ranks, bench.figures)
    return {
        "part": "linear", "shape": shape, "times": times, "wrong": wrong, "plan": plan.line(),
        "planned": plan.how,
    }  # fmt: skip


def _symmetric(bench: Bench, rows: int, columns: int) -> Tensor:
    import torch.distributed._symmetric_memory as symmetric_memory

    buffer = symmetric_memory.empty(rows, columns, dtype=DTYPE, device=bench.device)
    symmetric_memory.rendezvous(buffer, bench.group)
    return buffer.zero_()


def _others(bench: Bench, x: Tensor, weight: Tensor) -> dict[str, Callable[[], Run]]:
    rows, columns, name = len(x), len(weight), bench.group.group_name
    matrix = weight.t()

    def nccl() -> Run:
        out = torch.empty(rows, columns, dtype=DTYPE, device=bench.device)

        def run() -> Tensor:
            torch.mm(x, matrix, out=out)
            dist.all_reduce(out)
            return out

        return run

    def two_shot() -> Run:
        buffer = _symmetric(bench, rows, columns)

        def run() -> Tensor:
            torch.mm(x, matrix, out=buffer)
            torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", name)
            return buffer

        return run

    def scattered() -> Run:
        out = torch.empty(rows, columns, dtype=DTYPE, device=bench.device)

        def run() -> Tensor:
            part = torch.ops.symm_mem.fused_matmul_reduce_scatter(x, matrix, "sum", 0, name)
            dist.all_gather_into_tensor(out, part)
            return out

        return run

    return {
        "GEMM, NCCL": nccl, "GEMM, two-shot": two_shot, "fused_matmul_reduce_scatter": scattered,
    }  # fmt: skip


def _ours(
    bench: Bench, x: Tensor, weight: Tensor, ways: Sequence[str]
) -> dict[str, Callable[[], Run]]:
    rows, columns, tune = len(x), len(weight), bench.arguments.tune
    found: dict[str, Callable[[], Run]] = {}

    def summed(programs: int) -> Callable[[], Run]:
        def make() -> Run:
            way = SummedLinear(bench.peers, rows, columns, DTYPE, programs, bench.waiting)
            return lambda: way(x, weight)

        return make

    def chunked(chunks: Sequence[int]) -> Callable[[], Run]:
        def make() -> Run:
            way = ChunkedLinear(bench.peers, rows, columns, DTYPE, bench.waiting)
            return lambda: way(x, weight, chunks)

        return make

    def persistent(tiles: LinearTiles, bulk: bool) -> Callable[[], Run]:
        def make() -> Run:
            way = PersistentLinear(
                bench.peers, rows, columns, DTYPE, tiles, bench.cores, bench.waiting, bulk=bulk
            )
            return lambda: way(x, weight)

        return make

    plan = plan_linear(rows, columns, x.shape[1], bench.ranks, bench.figures)

    def planned() -> Run:
        way = RankReductions(bench.figures, (bench.peers, bench.waiting))
        return lambda: way.linear_all_reduce(x, weight)

    found[PLANNED] = planned
    if "two-shot" in ways:
        found["ours two-shot"] = summed(bench.figures.programs)
    if "chunks" in ways and bench.ranks == 2:
        cuts = chunkings(rows // 2, rows - rows // 2)
        for chunks in cuts if tune else [plan.chunks or cuts[len(cuts) // 2]]:
            found[f"ours chunks {'+'.join(map(str, chunks))}"] = chunked(chunks)
    if "persistent" in ways:
        own = {f"{one.rows}x{one.columns}x{one.depth}": one for one in bench.figures.tiles}
        for name, tiles in (TILES if tune else own).items():
            found[f"ours persistent {name}"] = persistent(tiles, True)
        for name, tiles in STORES.items() if tune else ():
            found[f"ours persistent {name}"] = persistent(tiles, False)
    return found


def _products_alone(bench: Bench, x: Tensor, weight: Tensor) -> dict[str, Run]:
    """Return the persistent kernel of one rank: what its tiles cost without a sum."""
    alone = on_one_device(1, bench.device)[0]
    way = PersistentLinear(
        alone, len(x), len(weight), DTYPE, bench.figures.tiles[0], bench.cores, bench.waiting
    )
    return {"tiles alone": lambda: way(x, weight)}


def _line(row: dict[str, Any]) -> str:
    times = {name: median(found) for name, found in row["times"].items()}
    ours = {name: value for name, value in times.items() if name.startswith("ours")}
    text = f"{row['shape']}:"
    for name in ("GEMM", "tiles alone", "NCCL", "two-shot", "our two-shot", "GEMM, NCCL",
                 "GEMM, two-shot", "fused_matmul_reduce_scatter"):  # fmt: skip
        if name in times:
            eager = "" if row["times"][name]["graph"] else " (no graph)"
            text += f" {name} {times[name]:.0f}{eager};"
    ranked = sorted(ours.items(), key=lambda found: found[1])
    for name, value in ranked[:14]:
        text += f"\n    {name}: {value:.0f}"
    return text + f"\n    plan: {row['plan']}"


def _summary(row: dict[str, Any]) -> str:
    times = {name: median(found) for name, found in row["times"].items()}
    ours = {name: value for name, value in times.items() if name.startswith("ours")}
    texts = [
        f"{times[name]:.0f}" if name in times else "-"
        for name in ("GEMM, NCCL", "GEMM, two-shot", "fused_matmul_reduce_scatter")
    ]
    if not ours:
        return f"{row['shape']}: {' | '.join(texts)} | none of ours"
    name = min(ours, key=lambda one: ours[one])
    texts.append(f"{ours.get(PLANNED, 0):.0f} {row['planned']}")
    texts.append(f"{ours[name]:.0f} ({name.removeprefix('ours ')})")
    if "GEMM, NCCL" in times:
        texts.append(f"{times['GEMM, NCCL'] / ours[name]:.2f}")
    sums = [times[one] for one in ("NCCL", "two-shot", "our two-shot") if one in times]
    if sums:
        apart, shorter = times["GEMM"] + min(sums), min(times["GEMM"], min(sums))
        texts.append(f"{(apart - ours[name]) / shorter:.0%}")
    return f"{row['shape']}: {' | '.join(texts)}"


def decode_part(bench: Bench) -> None:
    lines = []
    for kilobytes in (8, 16, 32, 64, 128, 256, 512, 1024):
        width = 4096
        rows = max(1, kilobytes * 512 // width)
        row = _decode(bench, rows, width)
        bench.keep(row)
        times = {name: round(median(found), 1) for name, found in row["times"].items()}
        lines.append(f"{kilobytes} KB: {times} {row['wrong'] or ''}")
        bench.say(lines[-1])


def _decode(bench: Bench, rows: int, width: int) -> dict[str, Any]:
    x = bench.random(rows, width, seed=3)
    exact = x.float()
    dist.all_reduce(exact)

    def check(result: Any) -> str | None:
        error = float((result.float() - exact).norm() / exact.norm())
        return None if error < 5e-3 else f"off by {error:.2g}"

    buffer = _symmetric(bench, rows, width)
    buffer.copy_(x)
    name = bench.group.group_name
    out = torch.empty_like(x)

    def nccl() -> Tensor:
        out.copy_(x)
        dist.all_reduce(out)
        return out

    one = OneShot(bench.peers, x.numel(), bench.waiting)
    two = TwoShot(bench.peers, rows, width, DTYPE, bench.cores, bench.waiting)

    def ours_two() -> Tensor:
        two.operand(rows).copy_(x)
        return two(rows)

    candidates: dict[str, Run] = {
        "NCCL": nccl,
        "one_shot_all_reduce": lambda: torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", name),
        "ours one-shot": lambda: one(x),
        "ours two-shot": ours_two,
    }
    runs, wrong = {}, {}
    for label, run in candidates.items():
        made = bench.right(lambda run=run: run, check)
        if isinstance(made, str):
            wrong[label] = made
        else:
            runs[label] = made
    return {
        "part": "decode", "shape": [rows, width], "bytes": 2 * rows * width,
        "times": bench.times(runs, 20), "wrong": wrong,
    }  # fmt: skip


def attention_part(bench: Bench) -> None:
    for tokens in (4096, 16384):
        row = _attention(bench, tokens)
        bench.keep(row)
        times = {name: round(median(found)) for name, found in row["times"].items()}
        bench.say(f"attention of {tokens} tokens: {times} {row['wrong'] or ''}")
        bench.say(f"    plan: {row['plan']}")


def _attention(bench: Bench, tokens: int) -> dict[str, Any]:
    heads, size, columns = 32, 128, 8192
    depth = heads * size
    q, k, v = (bench.random(1, heads, tokens, size, seed=seed) for seed in (4, 5, 6))
    weight = bench.random(columns, depth, seed=7, scale=depth**-0.5)
    matrix = weight.t()

    # torch's kernels for queries that are the last of the keys they see take twice as long.
    spec = AttentionSpec(head_dim=size, heads=heads, kv_heads=heads, dtype="bf16")
    attention_plan = plan_attention(spec, get_target(target_here()))
    kernel = get_family(attention_plan.kernel).load(attention_plan)

    def attend(q: Tensor, keys: Keys, extras: Extras, options: Mapping[str, Any]) -> Any:
        return kernel(q, keys, extras=extras, scale=options["scale"])

    by_rows = AttentionRows(attend, q, Keys(k, v), Extras(), {"scale": size**-0.5})

    def whole() -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(-1, depth)

    exact = whole().float() @ weight.float().t()
    dist.all_reduce(exact)
    size_of_exact = exact.norm()

    def check(result: Any) -> str | None:
        error = float((result.float() - exact).norm() / size_of_exact)
        return None if error < 8e-3 else f"off by {error:.2g}"

    out = torch.empty(tokens, columns, dtype=DTYPE, device=bench.device)

    def nccl() -> Tensor:
        torch.mm(whole(), matrix, out=out)
        dist.all_reduce(out)
        return out

    buffer = _symmetric(bench, tokens, columns)

    def two_shot() -> Tensor:
        torch.mm(whole(), matrix, out=buffer)
        torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", bench.group.group_name)
        return buffer

    planned = RankReductions(bench.figures, (bench.peers, bench.waiting))
    chunked = ChunkedLinear(bench.peers, tokens, columns, DTYPE, bench.waiting)
    tiles = bench.figures.tiles[0]
    persistent = PersistentLinear(
        bench.peers, tokens, columns, DTYPE, tiles, bench.cores, bench.waiting
    )
    attention = CausalAttention(tokens, heads)
    plan = plan_attention_linear(attention, columns, depth, bench.ranks, bench.figures)
    cuts = [cut for cut in chunkings(tokens // 2, tokens // 2) if len(cut) in (2, 3, 4)]
    candidates: dict[str, Run] = {
        "attention, GEMM, NCCL": nccl,
        "attention, GEMM, two-shot": two_shot,
        "our attention, ours persistent": lambda: persistent(by_rows.whole()[0], weight),
        PLANNED: lambda: planned.attention_linear_all_reduce(by_rows, weight)[0],
        "our attention, ours": lambda: planned.linear_all_reduce(by_rows.whole()[0], weight),
    }
    for chunks in dict.fromkeys([*cuts, *([plan.chunks] if plan.chunks else [])]):
        candidates[f"ours chunks {'+'.join(map(str, chunks))}"] = lambda chunks=chunks: chunked(
            by_rows.rows, weight, chunks
        )
    runs: dict[str, Run] = {}
    wrong = {}
    for name, run in candidates.items():
        made = bench.right(lambda run=run: run, check)
        if isinstance(made, str):
            wrong[name] = made
        else:
            runs[name] = made
    runs["attention"] = whole
    runs["our attention"] = by_rows.whole
    runs["attention, GEMM"] = lambda: torch.mm(whole(), matrix, out=out)
    return {
        "part": "attention", "shape": [tokens, depth, columns], "times": bench.times(runs, PER),
        "wrong": wrong, "plan": plan.line(), "planned": plan.how,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="decode,linear")
    parser.add_argument("--ways", default="others,two-shot,chunks,persistent")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of what fails")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        there = torch.cuda.device_count()
        if there < arguments.ranks:
            raise SystemExit(f"{arguments.ranks} ranks, and torch finds {there} GPUs")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [sys.executable, *launcher, str(arguments.ranks), *sys.argv]
        os.execv(sys.executable, command)
    # A rank that hangs says where, and ends.
    faulthandler.dump_traceback_later(arguments.seconds + 60, exit=True)
    try:
        bench = Bench(arguments)
        for part in arguments.parts.split(","):
            PARTS[part](bench)
    except Exception:
        rank = os.environ["RANK"]
        for line in traceback.format_exc().splitlines():
            print(f"rank {rank}: {line}", file=sys.stderr, flush=True)
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # not through the communicators of recorded graphs


PARTS = {"linear": linear_part, "decode": decode_part, "attention": attention_part}


if __name__ == "__main__":
    main()
