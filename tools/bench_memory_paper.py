"""A study's findings on memory in training, checked on its models.

    python tools/bench_memory_paper.py --part patterns --device cpu
    python tools/bench_memory_paper.py --part patterns --device cuda
    python tools/bench_memory_paper.py --part breakdown --device cpu

The study is Li et al., "Pinpointing the Memory Behaviors of DNN Training" (ISPASS 2021). Training
steps of its models: patterns (period, intervals between accesses, what could wait on the host) on
fake tensors, where times are those of a cost model, or on a GPU, by the clock of CUDA events and by
that of the host, as in the study; the breakdown of memory at the peak by batch size needs no
device. Results are kept under benchmarks/memory_paper.json after each model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from measure import keep
from paper_models import MODELS, batch_of
from results import given_words
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from graphopt.memory.analysis.devices import of_device
from graphopt.memory.analysis.intervals import Intervals, access_intervals
from graphopt.memory.analysis.kinds import bytes_by_category, bytes_by_kind
from graphopt.memory.analysis.link import Link, default_link, measure_link
from graphopt.memory.analysis.periods import find_period
from graphopt.memory.analysis.summary import SHORT_NS
from graphopt.memory.analysis.swap import swap_candidates
from graphopt.memory.caching_allocator import CachingAllocator
from graphopt.memory.cost import Roofline
from graphopt.memory.recording import record
from graphopt.memory.trace import FREE, MALLOC, READ, WRITE, Trace

OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "memory_paper.json"

SETTINGS = (
    ("MLP", "cifar", 128), ("AlexNet", "cifar", 128), ("VGG-16", "cifar", 128),
    ("ResNet-50", "cifar", 128), ("DenseNet-121", "cifar", 128), ("GoogLeNet", "cifar", 128),
    ("AlexNet", "imagenet", 64), ("VGG-16", "imagenet", 16), ("ResNet-50", "imagenet", 32),
    ("DenseNet-121", "imagenet", 32), ("GoogLeNet", "imagenet", 64),
)  # fmt: skip
"""Models, data and batch: those of the published logs, and others of the study's range."""

BATCHES = (1, 4, 16, 64, 256, 1024, 2304)
MLP_BATCHES = (1, 4, 16, 64, 1024, 16384, 262144, 1048576)

COMMAND = ["python", "tools/bench_memory_paper.py", given_words()]

ITERATIONS = 6
POINTS = 300
"""Intervals of a model that are kept for the figure: half of them the largest outliers."""

STUDY = Link(6.4e9, 6.3e9, source="the study's copies, without latency")
STUDY_FIT = Link(1e9 / 0.1563, 1e9 / 0.1574, 8242.0, 12352.0, "the study's fit of its copies")


class Steps:
    """Training steps of a model: a batch arrives on the device, and SGD updates the weights."""

    def __init__(self, name: str, data: str, batch: int, device: str) -> None:
        with torch.device(device):
            self.model = MODELS[name](data).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self._arguments = name, data, batch, device
        self._on_host = batch_of(name, data, batch, "cpu") if device == "cuda" else None

    def _arriving(self) -> tuple[Tensor, Tensor]:
        """Return a batch on the device. Fake tensors have no host: they appear there."""
        if self._on_host is None:
            return batch_of(*self._arguments)
        x, y = self._on_host
        return x.to("cuda"), y.to("cuda")

    def __call__(self) -> None:
        x, y = self._arriving()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()


TITAN_XP = Roofline(547e9, 12.15e12, 12.15e12, 5e3, "TITAN Xp (roofline)")
"""The study's GPU by its data sheet; 5 us is assumed of a kernel that has nothing to do."""


def traced(name: str, data: str, batch: int, device: str, iterations: int) -> Trace:
    """Return the trace of training steps; those on a CPU are of fake tensors."""
    if device == "cuda":
        return of_device(record(Steps(name, data, batch, "cuda"), iterations=iterations,
                                device="cuda"), "cuda")  # fmt: skip
    with FakeTensorMode():
        steps = Steps(name, data, batch, "cpu")
        return record(steps, iterations=iterations, device="cpu", cost=TITAN_XP)


def by_address(trace: Trace) -> Intervals:
    """Return intervals as the study's script forms them: between accesses of one address.

    Addresses are those of a model of torch's caching allocator; a block that follows another at
    its address goes on with its intervals.
    """
    address = addresses(trace)
    accesses = np.flatnonzero((trace.kind == READ) | (trace.kind == WRITE))
    return between(trace, accesses, address[trace.instance[accesses]])


def between(trace: Trace, events: np.ndarray, owners: np.ndarray) -> Intervals:
    """Return intervals between successive events of one owner."""
    order = np.argsort(owners, kind="stable")
    events, owners = events[order], owners[order]
    same = np.flatnonzero(owners[1:] == owners[:-1])
    first, second = events[same], events[same + 1]
    return Intervals(
        trace.instance[second].astype(np.int64), first, second,
        trace.time_ns[second] - trace.time_ns[first],
        trace.sizes[trace.instance[second]], np.zeros(len(same), bool),
    )  # fmt: skip


def addresses(trace: Trace) -> np.ndarray:
    """Return an address for each instance, by a model of torch's caching allocator."""
    allocator = CachingAllocator()
    blocks: dict[int, Any] = {}
    address = np.zeros(len(trace.instances), np.int64)
    for instance in trace.instances:
        if instance.external:
            blocks[instance.index] = allocator.malloc(instance.size)
    for kind, index in zip(trace.kind.tolist(), trace.instance.tolist(), strict=True):
        if kind == MALLOC:
            blocks[index] = allocator.malloc(trace.instances[index].size)
        elif kind == FREE:
            allocator.free(blocks[index])
            continue
        address[index] = blocks[index].address if blocks[index] else -1 - index
    return address


def patterns(trace: Trace, links: dict[str, Link]) -> dict[str, Any]:
    """Return what the study looks at in a trace."""
    period = find_period(trace)
    begin, stop = (0, len(trace)) if period is None else period.window
    live = trace.live_bytes()[begin:stop]
    peak = begin + int(live.argmax())
    found = access_intervals(trace, period)
    naive = by_address(trace)
    every = between(trace, np.arange(len(trace)), trace.instance.astype(np.int64))
    whole = access_intervals(trace)
    swaps = {}
    for name, link in links.items():
        some = swap_candidates(trace, found, link, peak=peak, window=(begin, stop))
        over = [c for c in some if c.over_peak]
        swaps[name] = {
            "link": link.describe(),
            "count": len(some),
            "over_peak": len(over),
            "blocks_over_peak": len({c.instance for c in over}),
            "bytes_over_peak": sum({c.instance: c.size for c in over}.values()),
            "largest": max((c.size for c in some), default=0),
        }
    return {
        "clock": trace.clock,
        "complete": trace.complete,
        "events": len(trace),
        "blocks": len(trace.instances),
        "period": None if period is None else {
            "events": period.events, "repeats": period.repeats, "warm_up": period.start,
            "duration_ns": period.duration(trace),
            "mallocs_and_frees": int((trace.kind[begin:stop] <= FREE).sum()),
        },
        "intervals": len(found),
        "share_below_25_us": found.share_below(SHORT_NS),
        "quantiles_ns": found.quantiles(),
        "by_address": {
            "intervals": len(naive), "across_reuse": len(naive) - len(whole),
            "share_below_25_us": naive.share_below(SHORT_NS),
            "within_blocks_share_below_25_us": whole.share_below(SHORT_NS),
            "mallocs_and_frees_too_share_below_25_us": every.share_below(SHORT_NS),
        },
        "peak_bytes": int(live.max()),
        "by_kind": bytes_by_kind(trace, peak),
        "by_category": bytes_by_category(trace, peak),
        "swap": swaps,
        "points": points(found),
    }  # fmt: skip


def points(found: Intervals) -> list[list[int]]:
    """Return some intervals as [gap, bytes]: the largest products of both, and others."""
    usable = np.flatnonzero((found.size > 0) & (found.gap > 0))
    order = usable[np.argsort(-(found.size[usable].astype(float) * found.gap[usable]))]
    rest = order[POINTS // 2 :]
    some = rest[:: max(1, len(rest) // (POINTS // 2))]
    kept = np.concatenate([order[: POINTS // 2], some])
    return [[int(found.gap[n]), int(found.size[n])] for n in kept]


def run_patterns(device: str, settings: Sequence[tuple[str, str, int]], out: Path) -> None:
    links = {"study": STUDY, "study_fit": STUDY_FIT}
    links["here"] = measure_link("cuda") if device == "cuda" else default_link()
    runs: list[dict[str, Any]] = []
    result = {"runs": runs, "iterations": ITERATIONS}
    for name, data, batch in settings:
        started = time.perf_counter()
        run: dict[str, Any] = {"model": name, "data": data, "batch": batch}
        if device == "cuda":
            torch.cuda.empty_cache()
            Steps(name, data, batch, "cuda")()  # what libraries set up at a first call
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        trace = traced(name, data, batch, device, ITERATIONS)
        run |= patterns(trace, links)
        if device == "cuda":
            run["max_memory_allocated"] = torch.cuda.max_memory_allocated()
            run["max_memory_reserved"] = torch.cuda.max_memory_reserved()
            host = of_device(
                record(Steps(name, data, batch, "cuda"), iterations=ITERATIONS), "cuda"
            )
            found = access_intervals(host, find_period(host))
            run["host_clock"] = {
                "clock": host.clock,
                "share_below_25_us": found.share_below(SHORT_NS),
                "quantiles_ns": found.quantiles(),
            }
            del host
        run["seconds"] = time.perf_counter() - started
        runs.append(run)
        period = run["period"] and run["period"]["events"]
        print(
            f"{name} {data} {batch}: period {period}, {run['share_below_25_us']:.1%} below 25 us, "
            f"peak {run['peak_bytes'] / 2**20:.0f} MiB, {run['seconds']:.1f} s",
            flush=True,
        )
        keep(out, "patterns", COMMAND, torch.device(device), result)


def run_breakdown(limit: int | None, out: Path) -> None:
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        for data in ("cifar",) if name == "MLP" else ("cifar", "imagenet"):
            for batch in (MLP_BATCHES if name == "MLP" else BATCHES)[:limit]:
                trace = traced(name, data, batch, "cpu", 2)
                size, event = trace.peak()
                rows.append(
                    {
                        "model": name, "data": data, "batch": batch, "peak_bytes": size,
                        "by_kind": bytes_by_kind(trace, event),
                        "by_category": bytes_by_category(trace, event),
                    }
                )  # fmt: skip
                print(name, data, batch, f"{size / 2**20:.2f} MiB", rows[-1]["by_kind"], flush=True)
            keep(out, "breakdown", COMMAND, torch.device("cpu"), {"rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=("patterns", "breakdown"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="one model")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--limit", type=int, help="batches of a model in the breakdown")
    arguments = parser.parse_args()
    if arguments.part == "breakdown":
        run_breakdown(arguments.limit, arguments.out)
        return
    settings = [s for s in SETTINGS if arguments.only in (None, s[0])]
    run_patterns(arguments.device, settings, arguments.out)


if __name__ == "__main__":
    main()
