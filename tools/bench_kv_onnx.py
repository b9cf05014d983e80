"""A decoding step under ONNX Runtime with KV policies, beside dense ones, in one run.

    python tools/bench_kv_onnx.py [--model demo] [--context 8192] [--budget 1/8] [--threads 2]
                                  [--policies quest,ema] [--rounds 30] [--steps 4]
                                  [--out benchmarks/kv_onnx.json]

Every graph decodes in buffers that are bound as the caches that come in and that go out, so that
keys and values are written where they lie; the dense one is that for onnxruntime-genai. Beside it
stands the dense `model.onnx`, whose caches grow by copying. Caches are filled with random numbers
up to the context: what a step takes does not hang on what is in them. Graphs take turns, some steps
each; the ratio is the median of those of the rounds, so that what else the machine does meanwhile
weighs on both sides; the load is noted. Behind that all is run again on one thread, by the time of
the processor, which others on the machine have less part in.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import keep

import graphopt as go
from graphopt.capture import capture

ROOT = Path(__file__).resolve().parent.parent
PAGE, SINK, LOCAL = 16, 64, 64
NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
AFTER = {"past_key_values.": "present.", "past_policy.": "present_policy."}


class Decoding:
    """A graph that decodes behind a text of random keys.

    Args:
        path: The graph.
        context: Tokens in the cache when a round begins.
        room: Slots of the cache.
        in_place: Whether what comes in and what goes out lie in the same buffers.
    """

    def __init__(self, path: Path, context: int, room: int, threads: int, in_place: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        # Threads that wait for more work would take the time of the graph whose turn is next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.context, self.in_place = context, in_place
        self.names = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        sizes = {
            "batch": 1, f"room_multiple_of_{PAGE}": room, "past": room if in_place else context,
            f"pages_of_{PAGE}": room // PAGE,
        }  # fmt: skip
        generator, self.pasts = np.random.default_rng(0), {}
        for value in self.session.get_inputs():
            if value.name.startswith(tuple(AFTER)):
                shape = [sizes.get(size, size) for size in value.shape]
                numbers: Any = np.zeros(shape, NUMPY[value.type])
                if value.type == "tensor(float)":
                    numbers = np.abs(generator.standard_normal(shape, np.float32))
                self.pasts[value.name] = numbers
        self.bound = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(numbers)
            for name, numbers in self.pasts.items()
            if in_place
        }
        if in_place:
            self.pasts.clear()

    def seconds(self, steps: int, clock: Callable[[], float]) -> float:
        """Return the seconds of a step, a mean over some from the context on."""
        pasts, times = dict(self.pasts), []
        for tokens in range(self.context, self.context + steps):
            given = {
                "input_ids": np.array([[5]]),
                "attention_mask": np.ones((1, tokens + 1), np.int64),
                "position_ids": np.array([[tokens]]),
            }
            given = {name: value for name, value in given.items() if name in self.names}
            started = clock()
            if self.in_place:
                self._bound_step(given)
            else:
                made = dict(
                    zip(
                        self.outputs,
                        self.session.run(self.outputs, {**given, **pasts}),
                        strict=True,
                    )
                )
                pasts = {name: made[_after(name)] for name in pasts}
            times.append(clock() - started)
        return statistics.mean(times)

    def _bound_step(self, given: dict[str, Any]) -> None:
        binding = self.session.io_binding()
        for name, value in given.items():
            binding.bind_cpu_input(name, value)
        for name, buffer in self.bound.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(_after(name), buffer)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)


def _after(name: str) -> str:
    """Return the output that leaves what an input takes."""
    return next(name.replace(a, b, 1) for a, b in AFTER.items() if name.startswith(a))


def in_turns(
    paths: Mapping[str | None, Path],
    size: tuple[int, int, int],
    rounds: int,
    steps: int,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Return the seconds of a step of each graph, round by round.

    Args:
        paths: Folders of graphs by the policies that they have.
        size: Context, room and threads.
    """
    graphs: dict[str, Decoding] = {}
    for kind, folder in paths.items():
        if kind is not None:
            graphs[kind] = Decoding(folder / "onnx" / "model.onnx", *size, in_place=True)
            continue
        graphs["dense"] = Decoding(folder / "onnx" / "genai.onnx", *size, in_place=True)
        graphs["dense, growing"] = Decoding(folder / "onnx" / "model.onnx", *size, in_place=False)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + 1):
        for name, graph in graphs.items():
            seconds = graph.seconds(steps, clock)
            if number:  # the first round reads weights and plans memory
                times[name].append(seconds)
    return times


def against(times: Mapping[str, list[float]], name: str) -> dict[str, Any]:
    """Return what a step of a graph takes, and how many times faster it is than the dense one."""
    ratios = [a / b for a, b in zip(times["dense"], times[name], strict=True)]
    return {
        "milliseconds": 1e3 * statistics.median(times[name]),
        "times_faster": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4),
    }


def emitted(model: str, kind: str | None, budget: int, context: int, folder: Path) -> None:
    """Write the graphs of a model, with a policy or without."""
    recipe = "canonicalise,insert-kv-cache"
    if kind is not None:
        recipe += (
            f",attach-kv-policy{{kind={kind},budget={budget},page={PAGE},sink={SINK},"
            f"local={LOCAL},context={context},verdict=ignore}}"
        )
    program, _ = go.Pipeline.parse(recipe).run(capture(model), go.RunOptions(verify=False))
    go.emit(program, folder, emit=("onnx",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--budget", default="1/8", help="share of the context")
    parser.add_argument("--policies", default="sink-local,ema,quest,page-range")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "kv_onnx.json")
    args = parser.parse_args()
    budget = int(Fraction(args.budget) * args.context) // PAGE * PAGE
    room = -(-(args.context + args.steps) // PAGE) * PAGE
    kinds = args.policies.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        paths = {None: Path(scratch) / "dense"} | {kind: Path(scratch) / kind for kind in kinds}
        for kind, folder in paths.items():
            emitted(args.model, kind, budget, args.context, folder)
        load = [os.getloadavg()[0]]
        size = args.context, room
        wall = in_turns(paths, (*size, args.threads), args.rounds, args.steps, time.perf_counter)
        load.append(os.getloadavg()[0])
        own = in_turns(paths, (*size, 1), args.rounds, args.steps, time.process_time)
    found = {
        "model": args.model,
        "context": args.context,
        "budget_tokens": budget,
        "page": PAGE,
        "threads": args.threads,
        "rounds": args.rounds,
        "steps": args.steps,
        "load": load,
        "graphs": [
            {
                "graph": name,
                **against(wall, name),
                "one_thread": against(own, name),
            }
            for name in wall
        ],
    }
    for row in found["graphs"]:
        print(
            f"{row['graph']:20}"
            + "  ".join(
                f"{one['milliseconds']:7.1f} ms x{one['times_faster']:.2f} "
                f"({one['quartiles'][0]:.2f} to {one['quartiles'][2]:.2f})"
                for one in (row, row["one_thread"])
            )
        )
    names = ("model", "context", "budget", "policies", "threads", "rounds", "steps")
    changed = [name for name in names if getattr(args, name) != parser.get_default(name)]
    given = [word for name in changed for word in (f"--{name}", str(getattr(args, name)))]
    command = ["python", "tools/bench_kv_onnx.py", *given]
    keep(args.out, f"{args.context} tokens", command, torch.device("cpu"), found)


if __name__ == "__main__":
    main()
