"""What steps of an emitted package allocate, with an arena and without.

    python tools/bench_arena.py OUT [--device cuda] [--dtype bfloat16] [--batch 1] [--prompt 64]
                                [--new 32] [--name NAME] [--out benchmarks/arena.json]

Texts of random tokens are read and answered, twice without an arena and twice with one. Counted is
what every step allocates: by torch.cuda.memory_stats on a GPU, and on a CPU by torch's profiler, in
a run apart from the one that takes times. A recorded CUDA graph allocates nothing when it is
replayed, so that decoding is counted as it is recorded from. Tokens must be the same. Seconds are
those of the CPU on a CPU, and those that pass on a GPU.

On a GPU, what torch's caching allocator reserves without an arena is told beside the plan.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SCALAR = 16
"""Bytes: on a CPU, torch makes a tensor of every number that an operation is given."""


class Plain:
    """In the place of an arena: steps run as they are."""

    buffer: Tensor | None = None
    steps: dict[Any, Any] = {}  # noqa: RUF012

    def run(self, key: Any, step: Callable[[int], Any], tokens: int = 0, most: int = 0) -> Any:
        return step(tokens)


class Counting:
    """Runs steps in what it is given, and counts what each allocates."""

    def __init__(self, inner: Any, on_gpu: bool, count: bool) -> None:
        self.inner, self.on_gpu, self.count = inner, on_gpu, count
        self.allocated: dict[str, list[dict[str, int]]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.room = getattr(inner, "room", None)

    @property
    def buffer(self) -> Tensor | None:
        found: Tensor | None = self.inner.buffer
        return found

    def run(self, key: Any, step: Callable[[int], Any], *tokens: int) -> Any:
        if self.on_gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_stats()
        clock = time.perf_counter if self.on_gpu else time.process_time
        began = clock()
        if self.on_gpu or not self.count:
            result = self.inner.run(key, step, *tokens)
        else:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                result = self.inner.run(key, step, *tokens)
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds.setdefault(key[0], []).append(clock() - began)
        if self.on_gpu:
            after = torch.cuda.memory_stats()
            names = ("allocation.all.allocated", "allocated_bytes.all.allocated")
            times, size = (after[name] - before[name] for name in names)
            found = {"times": times, "bytes": size}
        elif self.count:
            events = profile.profiler.kineto_results.events()
            sizes = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
            large = [size for size in sizes if size > SCALAR]
            found = {"times": len(large), "bytes": sum(large), "scalars": len(sizes) - len(large)}
        else:
            return result
        self.allocated.setdefault(key[0], []).append(found)
        return result


def tokens_of(
    module: ModuleType, model: Any, texts: list[list[int]], new: int, arena: Counting
) -> Any:
    """Return the answers to texts; a decoder's steps are not recorded as a graph."""
    if not hasattr(module, "Decoder"):
        if not isinstance(arena.inner, Plain):
            return list(module.steps_in_arena(model, texts, new, arena))
        steps = module.steps(model, texts, new)
        keys = [("prefill",), *[("decode",)] * (new - 1)]
        return [arena.run(key, lambda tokens: next(steps)) for key in keys]
    decoder = module.Decoder(model, len(texts[0]) + new, len(texts), arena)
    decoder.records = False
    return [decoder.step() if number else decoder.start(texts) for number in range(new)]


class Reserved(Plain):
    """Runs steps as they are, and tells what the allocator's pool and its use grow by in one."""

    def __init__(self) -> None:
        self.grown: dict[str, dict[str, int]] = {}

    def run(self, key: Any, step: Callable[[int], Any], tokens: int = 0, most: int = 0) -> Any:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        result = step(tokens)
        torch.cuda.synchronize()
        self.grown[key[0]] = {
            "reserved": torch.cuda.max_memory_reserved() - reserved,
            "allocated": torch.cuda.max_memory_allocated() - allocated,
        }
        return result


def reserved_by(run: Callable[[Counting], object]) -> dict[str, dict[str, int]]:
    """Return by phase what steps without an arena make the caching allocator reserve."""
    inner = Reserved()
    for _ in range(2):  # the first compiles, and makes workspaces
        run(Counting(inner, True, False))
    return inner.grown


def graph_seconds(
    module: ModuleType, model: Any, texts: list[list[int]], new: int
) -> Iterator[Any]:
    """Yield how long a recorded step takes, without and with an arena, and its tokens."""
    for arena in (None, module.arena_for(model)):
        decoder = module.Decoder(model, len(texts[0]) + new, len(texts), arena)
        tokens, seconds = [decoder.start(texts)], []
        for _ in range(new - 1):
            torch.cuda.synchronize()
            began = time.perf_counter()
            tokens.append(decoder.step())
            seconds.append(time.perf_counter() - began)
        yield statistics.median(seconds[1:]), tokens


def measured(module: ModuleType, args: argparse.Namespace) -> dict[str, Any]:
    on_gpu = torch.device(args.device).type == "cuda"
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = module.load(args.folder, device=args.device, dtype=dtype)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (args.batch, args.prompt), generator=random).tolist()
    arena = module.arena_for(model)
    row: dict[str, Any] = {}
    if on_gpu:
        row["caching_allocator"] = reserved_by(lambda run: tokens_of(module, model, ids, 4, run))
    runs: dict[str, Any] = {}
    answers = []
    for name, inner in (("plain", Plain()), ("arena", arena)):
        for again in range(2):
            for count in (False,) if on_gpu else (False, True):
                counting = Counting(inner, on_gpu, count)
                answers.append(tokens_of(module, model, ids, args.new, counting))
                run = runs.setdefault(f"{name}, {'again' if again else 'first'}", {})
                for phase, seconds in counting.seconds.items():
                    kept = run.setdefault(phase, {})
                    if not count:
                        # The first decoding step of the first time is the one that is planned by.
                        kept["seconds"] = statistics.median(seconds[1:] or seconds)
                    if phase in counting.allocated:
                        kept["allocated_first"] = counting.allocated[phase][0]
                        kept["allocated_later_most"] = max(
                            counting.allocated[phase][1:] or [counting.allocated[phase][0]],
                            key=lambda each: each["bytes"],
                        )
    assert all(each == answers[0] for each in answers), "tokens differ"
    steps = {
        " ".join(map(str, key)): {
            "height": step.height,
            "live": step.live,
            "left_out": step.left_out,
            "unplanned": step.unplanned,
        }
        for key, step in arena.steps.items()
    }
    row |= {"runs": runs, "buffer_bytes": arena.bytes, "steps": steps, "report": arena.report()}
    if on_gpu and hasattr(module, "Decoder") and module.RECORDS:
        (plain, tokens), (in_arena, same) = graph_seconds(module, model, ids, args.new)
        assert tokens == same, "tokens of recorded steps differ"
        row["graph_seconds"] = {"plain": plain, "arena": in_arena}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of an emitted model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--name", help="of the row; by default the folder's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/arena.json"))
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("emitted_model", args.folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    on_gpu = torch.device(args.device).type == "cuda"
    device = (
        torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()} CPU, {os.cpu_count()} cores, {platform.system()}"
    )
    name = args.name or args.folder.name
    row = {
        "command": "python tools/bench_arena.py "
        + shlex.join([args.folder.name, *sys.argv[2:]]).partition(" --out")[0],
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": {"torch": metadata.version("torch")},
        "batch": args.batch,
        "prompt": args.prompt,
        "new": args.new,
        **measured(module, args),
    }
    kept = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    kept[name] = row
    args.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    print("\n".join(row["report"]))
    for run, phases in row["runs"].items():
        for phase, found in phases.items():
            print(run, phase, found)
    for name in ("caching_allocator", "graph_seconds"):
        print(name, row.get(name))


if __name__ == "__main__":
    main()
