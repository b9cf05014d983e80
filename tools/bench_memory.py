"""Compare what is said of memory with what torch's allocator for GPUs says, on one GPU.

    python tools/bench_memory.py [--part events,predict,capacity,overhead] [--device cuda]
        [--memory 24GB] [--seed 20] [--out benchmarks/memory.json] [--quick]

* `events`: steps of each phase are recorded; the live bytes at the peak beside those of the
  allocator's own history, with what only that has seen and without, and whether both have one
  order; and whether tensors without values give the same events.
* `predict`: settings are drawn with a seed, model, phase, batch, length and dtype; what was
  predicted without a GPU beside `torch.cuda.max_memory_allocated` and `max_memory_reserved`.
* `capacity`: with the GPU limited to `--memory`, the largest batch or length that is predicted to
  fit beside the largest that runs, which is searched.
* `overhead`: on the CPU, how much longer a recorded step takes, in CPU time.

Every part keeps its results as it goes, and a part that fails says so there. Without a GPU nothing
is measured but the overhead, and events are compared with those of the CPU: that says only whether
this script runs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import LLAMA_7B, keep
from results import given_words

import graphopt as go
from graphopt.execute.memory_fit import largest_batch, largest_seq
from graphopt.execute.workloads import PHASES, program_workload
from graphopt.ir.graph import Program
from graphopt.memory.cuda_history import AllocatorHistory, order_errors
from graphopt.memory.predict import predict_peak
from graphopt.memory.recorder import Recorder
from graphopt.memory.stand_in import StandIn
from graphopt.memory.trace import Trace
from graphopt.memory.workload import Workload
from graphopt.support.boundary import out_of_memory

ROOT = Path(__file__).parents[1]
SMOLLM2 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152,
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
"""The demo, whose weights are not needed."""

MODELS: dict[str, dict[str, Any]] = {
    "demo": SMOLLM2,
    "7B block": {**LLAMA_7B, "num_hidden_layers": 1},
}
MOST_BYTES = 60e9
"""What a drawn setting takes at most, as predicted."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@functools.cache
def program_of(model: str, quick: bool) -> Program:
    """Return a model as a program with a KV cache; none of its weights has values."""
    config = dict(MODELS[model])
    if quick:
        config |= {
            "num_hidden_layers": 1, "hidden_size": 192, "intermediate_size": 256,
            "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 512,
        }  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        program = go.capture(f"config:{path}")
    recipe = go.Pipeline.parse("canonicalise,insert-kv-cache")
    return recipe.run(program, go.RunOptions(verify=False))[0]


def emptied() -> int:
    """Give all memory of the GPU back; return the bytes that are in use all the same."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def sequence(trace: Trace, device: str) -> list[tuple[int, int, str]]:
    """Return the events of one device as kind, size and operation."""
    columns = zip(trace.kind.tolist(), trace.instance.tolist(), trace.op.tolist(), strict=True)
    return [
        (kind, trace.instances[index].size, trace.op_names[op])
        for kind, index, op in columns
        if trace.instances[index].device == device
    ]


def difference(one: list[Any], other: list[Any]) -> dict[str, Any]:
    """Return whether two sequences of events are equal, and their first difference."""
    place = next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
                 min(len(one), len(other)))  # fmt: skip
    same = len(one) == len(other) == place
    found: dict[str, Any] = {"events": len(one), "same": same}
    if not same:
        shared = Counter(one) & Counter(other)
        found |= {
            "first_difference": place,
            "gpu": [str(e) for e in one[place : place + 4]],
            "without_values": [str(e) for e in other[place : place + 4]],
            "in_common": sum(shared.values()) / max(len(one), len(other), 1),
        }
    return found


class Bench:
    """A run of the parts.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.gpu = self.device.type == "cuda"
        self.quick = options.quick
        self.memory = int(float(options.memory.upper().removesuffix("GB")) * 1e9)
        self.capability = torch.cuda.get_device_capability() if self.gpu else (9, 0)

    def run(self, part: str) -> bool:
        """Run a part; return whether it came to its end."""
        found: dict[str, Any] = {"rows": []}
        started = time.perf_counter()
        try:
            getattr(self, part)(found, functools.partial(self.save, part, found))
        except Exception:
            found["failed"] = traceback.format_exc()
            print(found["failed"], flush=True)
        found["seconds"] = time.perf_counter() - started
        self.save(part, found)
        return "failed" not in found

    def save(self, part: str, found: dict[str, Any]) -> None:
        command = ["python", "tools/bench_memory.py", given_words()]
        where = torch.device("cpu") if part == "overhead" else self.device
        keep(Path(self.options.out), part, command, where, found)

    def attempt(self, row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a row with what work gave, or with how it failed."""
        try:
            row = {**row, **work()}
        except Exception as error:
            traceback.print_exc()
            row = {**row, "failed": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(row), flush=True)
        return row

    # ---------------------------------------------------------------- events

    def events(self, found: dict[str, Any], save: Callable[[], None]) -> None:
        sizes = {"prefill": (4, 1024), "decode": (8, 1024), "train": (4, 512),
                 "calibrate": (8, 1024)}  # fmt: skip
        for model in MODELS:
            for phase in PHASES:
                batch, seq = (2, 32) if self.quick else sizes[phase]
                row = {"model": model, "phase": phase, "batch": batch, "seq": seq}
                work = functools.partial(self.one_trace, model, phase, batch, seq)
                found["rows"].append(self.attempt(row, work))
                emptied()
                save()

    def make(
        self, model: str, phase: str, batch: int, seq: int, dtype: str = "bfloat16"
    ) -> Callable[[torch.device], Workload]:
        program = program_of(model, self.quick)
        return lambda device: program_workload(
            program, phase, device, batch=batch, seq=seq, dtype=DTYPES[dtype]
        )

    def one_trace(self, model: str, phase: str, batch: int, seq: int) -> dict[str, Any]:
        make = self.make(model, phase, batch, seq)
        emptied()
        workload = make(self.device)
        for _ in range(workload.warm_up + 1):
            workload.step()
        found: dict[str, Any] = {}
        if self.gpu:
            trace, found = self.with_history(workload)
        else:
            trace = workload.record()
        del workload
        with StandIn(self.capability) as stand_in:
            other = make(stand_in.device)
            for _ in range(other.warm_up + 1):
                other.step()
            without = other.record()
            there = str(stand_in.device)
        here = "cuda:0" if self.gpu else "cpu"
        return {**found, **difference(sequence(trace, here), sequence(without, there))}

    def with_history(self, workload: Workload) -> tuple[Trace, dict[str, Any]]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        history = AllocatorHistory(self.device)
        recorder = Recorder("cuda events")
        with history, recorder:
            for category, tensors in workload.tags().items():
                recorder.tag(tensors, category)
            recorder.mark_iteration()
            out = workload.step()
            del out
        stats = torch.cuda.memory_stats()
        trace = recorder.finish()
        trace.check()
        host = recorder.log.host_times
        joined = history.join(trace, recorder.addresses, host)
        joined.check()
        here = trace.where(lambda i: i.device == "cuda:0")
        there = joined.where(lambda i: i.device == "cuda:0")
        snapshot = history.peak()
        live = joined.peak(there).bytes
        inside: Counter[str] = Counter()
        for instance in joined.instances:
            if instance.category == "workspace":
                inside[instance.producer or "held before"] = max(
                    inside[instance.producer or "held before"], instance.size
                )
        matched, wrong = order_errors(trace, recorder.addresses, *history._here(), "cuda:0")
        return trace, {
            "snapshot_peak": snapshot,
            "requested_peak": stats["requested_bytes.all.peak"],
            "allocated_peak": stats["allocated_bytes.all.peak"],
            "live_peak": live,
            "live_error": live / snapshot - 1,
            "tensors_alone_peak": trace.peak(here).bytes,
            "tensors_alone_error": trace.peak(here).bytes / snapshot - 1,
            "instances_in_history": matched,
            "out_of_order": wrong,
            "largest_inside": dict(inside.most_common(12)),
            "milliseconds": int(trace.time_ns[-1]) / 1e6,
        }

    # ---------------------------------------------------------------- predict

    def drawn(self) -> list[dict[str, Any]]:
        """Draw settings: two of each model and phase, within what the GPU has."""
        draw = random.Random(self.options.seed)
        settings = []
        for model in MODELS:
            for phase in PHASES:
                for number in range(1 if self.quick else 2):
                    while True:
                        dtype = "bfloat16" if number == 0 or phase == "calibrate" else (
                            draw.choice(list(DTYPES))
                        )  # fmt: skip
                        batch = round(2 ** draw.uniform(0, 2 if self.quick else 5.5))
                        seq = round(2 ** draw.uniform(5, 6) if self.quick
                                    else 2 ** draw.uniform(6, 12))  # fmt: skip
                        settings.append({"model": model, "phase": phase, "batch": batch,
                                         "seq": seq, "dtype": dtype})  # fmt: skip
                        if batch * seq <= 65536:
                            break
                        settings.pop()
        return settings

    def predict(self, found: dict[str, Any], save: Callable[[], None]) -> None:
        found["seed"] = self.options.seed
        for setting in self.drawn():
            found["rows"].append(self.attempt(setting, functools.partial(self.one_peak, setting)))
            emptied()
            save()

    def one_peak(self, setting: dict[str, Any]) -> dict[str, Any]:
        make = self.make(**setting)
        started = time.process_time()
        predicted = predict_peak(make, capability=self.capability)
        row: dict[str, Any] = {
            "predicted": predicted.allocated,
            "predicted_reserved": predicted.reserved,
            "categories": predicted.categories,
            "libraries": predicted.libraries,
            "prediction_cpu_seconds": time.process_time() - started,
        }
        if predicted.allocated > MOST_BYTES:
            return {**row, "left_out": "larger than the bench runs"}
        if not self.gpu:
            return row
        row["held_before"] = emptied()
        workload = make(self.device)
        for _ in range(workload.warm_up + 1):
            workload.step()
        torch.cuda.synchronize()
        measured, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {
            **row,
            "measured": measured,
            "measured_reserved": reserved,
            "error": predicted.allocated / measured - 1,
            "reserved_error": predicted.reserved / reserved - 1,
        }

    # ---------------------------------------------------------------- capacity

    def capacity(self, found: dict[str, Any], save: Callable[[], None]) -> None:
        found["memory"] = self.memory
        settings: list[tuple[str, str, dict[str, int]]] = [
            ("demo", "prefill", {"seq": 1024}),
            ("demo", "train", {"seq": 512}),
            ("demo", "decode", {"seq": 2048}),
            ("7B block", "train", {"seq": 1024}),
            ("7B block", "prefill", {"batch": 4}),
            ("7B block", "decode", {"seq": 1024}),
            ("7B block", "calibrate", {"seq": 2048}),
        ]
        told = torch.cuda.mem_get_info
        if self.gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(self.memory / total)
            # What decides by free memory is told of a GPU of that size.
            torch.cuda.mem_get_info = lambda device=None: (self.memory, self.memory)
        try:
            for model, phase, fixed in settings[: 2 if self.quick else None]:
                row = {"model": model, "phase": phase, **fixed}
                work = functools.partial(self.one_capacity, model, phase, fixed)
                found["rows"].append(self.attempt(row, work))
                emptied()
                save()
        finally:
            torch.cuda.mem_get_info = told
            if self.gpu:
                torch.cuda.set_per_process_memory_fraction(1.0)

    def one_capacity(self, model: str, phase: str, fixed: dict[str, int]) -> dict[str, Any]:
        program = program_of(model, self.quick)
        memory = 120_000_000 if self.quick else self.memory
        search: Any = largest_batch if "seq" in fixed else largest_seq
        started = time.process_time()
        fit = search(program, memory, phase=phase, capability=self.capability, **fixed)
        row: dict[str, Any] = {
            "searched": "batch" if "seq" in fixed else "seq",
            "predicted": fit.value,
            "predicted_reserved": fit.prediction.reserved,
            "bounded": fit.bounded,
            "prediction_cpu_seconds": time.process_time() - started,
        }
        if not self.gpu:
            return row

        def runs(size: int) -> bool:
            emptied()
            sizes = {**fixed, row["searched"]: size}
            try:
                workload = program_workload(program, phase, self.device, **sizes)
                for _ in range(workload.warm_up + 1):
                    workload.step()
                torch.cuda.synchronize()
            except Exception as error:
                if out_of_memory(error) is None:
                    raise
                return False
            return True

        tried: dict[int, bool] = {}
        below, above = 0, 0
        size, step = max(fit.value, 1), max(1, fit.value // 64)
        while above == 0 or above - below > 1:
            tried[size] = runs(size)
            if tried[size]:
                below = max(below, size)
            else:
                above = size if above == 0 else min(above, size)
            if above == 0:
                size += step
            elif below == 0:
                if size == 1:
                    break
                size = max(1, size - step)
            else:
                size = (below + above) // 2
            step *= 2
        return {
            **row,
            "runs": below,
            "tried": {str(k): v for k, v in sorted(tried.items())},
            "error": fit.value / below - 1 if below else None,
        }

    # ---------------------------------------------------------------- overhead

    def overhead(self, found: dict[str, Any], save: Callable[[], None]) -> None:
        cpu = torch.device("cpu")
        for phase, batch, seq in (("decode", 1, 128), ("prefill", 1, 128), ("train", 1, 64)):
            row = {"model": "demo", "phase": phase, "batch": batch, "seq": seq, "dtype": "float32"}
            work = functools.partial(self.one_overhead, phase, batch, seq, cpu)
            found["rows"].append(self.attempt(row, work))
            save()

    def one_overhead(self, phase: str, batch: int, seq: int, cpu: torch.device) -> dict[str, Any]:
        workload = program_workload(
            program_of("demo", self.quick), phase, cpu, batch=batch, seq=seq, dtype=torch.float32
        )
        for _ in range(2):
            workload.step()
        plain, recorded = [], []
        for _ in range(3 if phase == "train" or self.quick else 9):
            begun = time.process_time()
            workload.step()
            plain.append(time.process_time() - begun)
            with Recorder() as recorder:
                begun = time.process_time()
                workload.step()
                recorded.append(time.process_time() - begun)
        pairs = [b / a for a, b in zip(plain, recorded, strict=True)]
        return {
            "cpu_seconds": plain,
            "recorded_cpu_seconds": recorded,
            "times": statistics.median(pairs),
            "events": len(recorder.finish()),
        }


PARTS = ("events", "predict", "capacity", "overhead")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default=",".join(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", default="24GB")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "memory.json"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    parts = options.part.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]!r}; known: {', '.join(PARTS)}")
    bench = Bench(options)
    ended = [bench.run(part) for part in parts]
    return 0 if all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
