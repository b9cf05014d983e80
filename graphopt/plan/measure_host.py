"""Measuring what keys in a host's memory take: `graphopt.targets.HostFigures` of this machine."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pydantic
import torch

from graphopt.errors import UsageError
from graphopt.runtime.copies import copies_on, pin
from graphopt.runtime.host_attention import Job, fill_job, host_kernel, host_memory, host_sum
from graphopt.runtime.host_step import run_job
from graphopt.support.inputs import Schema, parse, read_json, shown_path
from graphopt.targets import HostFigures

KEYS, KEY_HEADS, HEADS, DIM = 65536, 8, 32, 128
_ROUNDS, _CALLS = 7, 30
Rate = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]


class MeasuredHost(Schema):
    """The file of `graphopt measure-host`.

    Attributes:
        link, attention, link_beside, attention_beside, call: See `HostFigures`.
        memory: Bytes a second that all threads read together, and do nothing else.
        device, processor, threads, date: Where and when.
    """

    link: Rate
    attention: Rate
    link_beside: Rate
    attention_beside: Rate
    call: Annotated[float, pydantic.Field(ge=0, le=1)]
    memory: Rate
    device: str
    processor: str
    threads: int
    date: str

    def figures(self) -> HostFigures:
        """Return what the planner counts with."""
        return HostFigures(
            self.link, self.attention, self.link_beside, self.attention_beside, self.call
        )


def read_measured_host(path: Path) -> MeasuredHost:
    """Return what a file of `graphopt measure-host` says.

    Raises:
        UsageError: It cannot be read, or says something else.
    """
    remedy = "Make it anew by `graphopt measure-host`."
    found = read_json(path, limit=2**20, remedy=remedy, error=UsageError)
    return parse(MeasuredHost, found, shown_path(path), remedy=remedy, error=UsageError)


class HostBench:
    """Keys of some layers in host memory, with what attends to them and what copies them.

    Args:
        keys, batch: Tokens of a text, and texts.
        layers: How many, which take turns as those of a model do.

    Raises:
        NoHostKernel: There is no C++ compiler.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        keys: int = KEYS,
        layers: int = 1,
        batch: int = 1,
        key_heads: int = KEY_HEADS,
        heads: int = HEADS,
        dim: int = DIM,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.device = device
        half = batch * key_heads * keys * dim * dtype.itemsize
        self.memory = host_memory(2 * layers * half, half)
        if device.type == "cuda":
            pin(self.memory, self)
        # The same numbers again and again: what is read decides, not what it is.
        some, flat = torch.randn(2**16).to(dtype), self.memory.view(dtype)
        for start in range(0, len(flat), len(some)):
            flat[start : start + len(some)] = some[: len(flat) - start]
        self.layers = self.memory.view(layers, 2 * half)
        shape = (1, batch, key_heads, keys, dim)
        self.kv = [[part.view(dtype).view(shape) for part in layer.split(half)]
                   for layer in self.layers]  # fmt: skip
        self.q = torch.randn(batch, heads, 1, dim).to(dtype)
        self.lens = torch.full((batch,), keys, dtype=torch.int32)
        self.out, self.lse = torch.empty(batch, heads, 1, dim), torch.empty(batch, heads, 1)
        self.there = torch.empty_like(self.layers[0], device=device)
        self.copies = copies_on(device)

    def job(self, layer: int, begin: int = 0) -> Job:
        """Return attention to all keys of a layer from slot `begin` on."""
        job, (k, v) = Job(), self.kv[layer]
        fill_job(
            job, self.q, k, v, self.lens, self.out, self.lse, width=self.q.shape[3],
            scale=self.q.shape[3] ** -0.5, begin=begin,
        )  # fmt: skip
        return job

    def attend(self, job: Job) -> None:
        """Attend to keys in this thread and the kernel's own."""
        host_kernel().graphopt_host_step(ctypes.byref(job))

    def copy(self, layer: int) -> None:
        self.there.copy_(self.layers[layer], non_blocking=True)

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _seconds(run: Callable[[], None], rounds: int = _ROUNDS) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_host(
    device: torch.device, *, keys: int = KEYS, layers: int | None = None
) -> MeasuredHost:
    """Measure the rates of this machine's host and of its link to a device.

    Without a GPU copies in host memory stand for the link.

    Args:
        keys: How many each layer has.
        layers: How many take turns; so many that no cache holds their keys unless it is said.

    Raises:
        NoHostKernel: There is no C++ compiler.
    """
    bench = HostBench(device, keys=keys, layers=layers or _layers_beyond_caches(keys))
    size, count = bench.layers[0].nbytes, len(bench.layers)
    jobs = [bench.job(layer) for layer in range(count)]

    def attend() -> None:
        for job in jobs:
            bench.attend(job)

    def copy() -> None:
        for layer in range(count):
            bench.copy(layer)
        bench.synchronise()

    attending, copying = _seconds(attend) / count, _seconds(copy) / count
    reading = _seconds(lambda: (host_sum(bench.memory), None)[1]) / count
    beside = _beside(bench, jobs, attending, copying)
    short = bench.job(0, begin=max(0, keys - 1))

    def call() -> None:
        run_job(short, device)
        bench.synchronise()

    return MeasuredHost(
        link=size / copying,
        attention=size / attending,
        link_beside=size / beside[1],
        attention_beside=size / beside[0],
        call=_seconds(call, _CALLS),
        memory=size / reading,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        processor=processor(),
        threads=int(host_kernel().graphopt_threads()),
        date=datetime.date.today().isoformat(),
    )


def _layers_beyond_caches(keys: int) -> int:
    """Return how many layers' keys are four times the processor's cache, and a gigabyte."""
    cache = 0
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system says it
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    layer = 2 * KEY_HEADS * keys * DIM * torch.bfloat16.itemsize
    return max(2, -(-max(2**30, 4 * cache) // layer))


def _beside(
    bench: HostBench, jobs: list[Job], attending: float, copying: float
) -> tuple[float, float]:
    """Return the seconds of an attention and of a copy while both go on."""
    if bench.device.type != "cuda":
        return 2 * attending, 2 * copying  # copies are the processors' own work
    # Copies enough to go on as long as attention does, and the other way round.
    copies = max(3, round(2 * _ROUNDS * attending / copying))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(copies + 1)]
    events[0].record()
    # Each has another layer's keys at hand than the other.
    for event, layer in zip(events[1:], itertools.cycle(range(len(jobs))), strict=False):
        bench.copy(layer)
        event.record()
    times = []
    turns = itertools.cycle(reversed(jobs))
    while not events[-1].query():
        start = time.perf_counter()
        bench.attend(next(turns))
        times.append(time.perf_counter() - start)
    bench.synchronise()
    spans = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    # The last attention may have gone on alone.
    return statistics.median(times[:-1] or times), statistics.median(spans)


def processor() -> str:
    """Return what the processor is called, and how many of them this process may use."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {_processors()} processors"
    return f"{platform.machine()}, {_processors()} processors"


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_measured_host(path: Path, measured: MeasuredHost) -> None:
    """Write what was measured, for `figures=` of place-kv."""
    path.write_text(json.dumps(measured.model_dump(), indent=1) + "\n", encoding="utf-8")
