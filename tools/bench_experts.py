"""Measure models carved into experts on a GPU: the time of a part, its quality, and a 7B carve.

    python tools/bench_experts.py ffn                      # a part of Llama-7B's shape, and dense
    python tools/bench_experts.py quality --calib FILE --text FILE
    python tools/bench_experts.py shape                    # carve a random Llama-7B

Each part is kept in benchmarks/width.json beside what other benches gave.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import LLAMA_7B, brief, keep, random_llama, run_recipes, target_here

from graphopt.calibration.expert_load import expert_loads
from graphopt.capture import capture
from graphopt.evaluate.perplexity import read_text
from graphopt.execute.language_model import ProgramModel, load_tokenizer
from graphopt.ir import functional
from graphopt.ir.graph import Program
from graphopt.lowering.kernels.triton import expert_tiles
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.runtime import fused, moe
from graphopt.support.recorded import record
from graphopt.targets import get_target

ROOT = Path(__file__).resolve().parent.parent
SPLITS = {"S3A3E8": (3, 3, 8), "S2A2E16": (2, 2, 16)}
PREFILL = (512, 1024, 4096, 16384)
BATCHES = (1, 2, 4, 16, 64)
TURNS = 7
RUNS = 20
"""Runs of a turn; its time is their mean."""
FLUSHES = 16
"""Writes of 256 MiB in front of a run: caches are cold, and the host is ahead with its launches."""

COUNTED = 16
"""Windows of the evaluation text in which experts are counted."""
LEARNT = 64 * 2048
"""Tokens of the calibration text that recipes get, checks on held-out windows among them."""
TUNED = ",tune-moe{seconds=45,generated_windows=0}"
RECIPES = [
    f"carve-moe{{shared={groups},experts={experts}{option}}}{behind}"
    for shared, active, experts in SPLITS.values()
    for groups, option, behind in (
        (f"{shared},active={active}", "", ""),
        (f"{shared},active={active}", ",mode=published", ""),
        (f"{shared},active={active}", ",threshold=true", ""),
        (f"{shared},active={active}", ",layerwise_budget=true", ""),
        (f"{shared + active},active=0", "", ""),
        (f"{shared + active},active=0", ",layerwise_budget=true", ""),
        (f"{shared},active={active}", "", TUNED),
        (f"{shared},active={active}", ",threshold=true", TUNED),
        (f"{shared},active={active}", ",layerwise_budget=true", TUNED),
        (f"{shared + active},active=0", "", TUNED),
        (f"{shared},active={active}", "", ",tune-moe{seconds=45}"),
    )
]


@functools.cache
def kernels() -> moe.ExpertKernels:
    """Return the experts' kernels with the tiles of the target that this GPU is."""
    tiles = expert_tiles(get_target(target_here()))
    assert tiles is not None
    return moe.ExpertKernels(tiles)


class Part:
    """A feed-forward part of Llama-7B's shape with random weights, dense and carved."""

    def __init__(self, split: tuple[int, int, int], dtype: torch.dtype) -> None:
        shared, self.active, groups = split
        width, neurons = LLAMA_7B["hidden_size"], LLAMA_7B["intermediate_size"]
        assert isinstance(width, int) and isinstance(neurons, int)
        self.dtype = dtype
        self.neurons = neurons
        self.gate_up, self.down = self.random(2 * neurons, width), self.random(width, neurons)
        self.router = self.random(groups - shared, width)
        self.offset = self.random(groups - shared)
        own = neurons // groups * shared
        gate, up = self.gate_up.split(neurons)
        self.weights = {
            "up": up[own:], "down": self.down[:, own:], "gate": gate[own:],
            "shared_up": up[:own], "shared_down": self.down[:, :own], "shared_gate": gate[:own],
        }  # fmt: skip
        self.weights = {name: value.contiguous() for name, value in self.weights.items()}

    def random(self, *shape: int) -> Tensor:
        return (torch.randn(shape, device="cuda") / shape[-1] ** 0.5).to(self.dtype)

    def dense(self, x: Tensor) -> Tensor:
        """As an emitted model computes a part that is not carved."""
        gate, up = functional.linear(x, self.gate_up).split(self.neurons, -1)
        return functional.linear(fused.act_mul(gate, up, "silu"), self.down)

    def carved(self, x: Tensor) -> Tensor:
        """As an emitted model computes a carved part."""
        gates = moe.route(x, self.router, self.offset, count=self.active)
        return kernels().moe(x, gates, **self.weights, act="silu", active=self.active)


def ffn(options: argparse.Namespace) -> dict[str, Any]:
    """Time a carved part beside the dense one, in turns; up to 64 tokens as recorded graphs.

    Of more tokens the host's time to launch a part is measured as well.
    """
    torch.manual_seed(options.seed)
    rows: list[dict[str, Any]] = []
    for name, split in SPLITS.items():
        part = Part(split, torch.bfloat16)
        for tokens in (*BATCHES, *PREFILL):
            # As large as what a norm gives.
            x = part.random(tokens, 4096) * 64
            runs = {
                "dense": functools.partial(part.dense, x),
                "carved": functools.partial(part.carved, x),
            }
            row: dict[str, Any] = {"split": name, "tokens": tokens}
            with torch.no_grad():
                check(part, x)
                if tokens in BATCHES:
                    runs = {form: recorded(run) for form, run in runs.items()}
                else:
                    row["host_microseconds"] = {form: launched(run) for form, run in runs.items()}
                times = in_turns(runs)
            medians = {form: statistics.median(found) for form, found in times.items()}
            share = medians["carved"] / medians["dense"]
            rows.append({**row, "microseconds": times, "share": share})
            shown = ", ".join(f"{form} {value:.1f} us" for form, value in medians.items())
            print(f"{name} {tokens}: {shown}, {share:.3f}", flush=True)
    return {"dtype": "bfloat16", "shape": "Llama-7B", "rows": rows}


def check(part: Part, x: Tensor) -> None:
    """Compare with all neurons computed and those of other experts put to 0."""
    gates = moe.route(x, part.router, part.offset, count=part.active)
    plain = functional.moe(x, gates, **part.weights, act="silu", active=part.active).float()
    error = float((part.carved(x).float() - plain).abs().max() / plain.abs().max())
    assert error < 2e-2, error


def recorded(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a run as a CUDA graph, so that nothing is launched one by one."""
    graph, result = record(run, runs=3)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def launched(run: Callable[[], Tensor]) -> list[float]:
    """Return microseconds in which the host launches a run, whatever the GPU has done of it."""
    found = []
    for _ in range(TURNS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(RUNS):
            run()
        found.append(1e6 * (time.perf_counter() - started) / RUNS)
    torch.cuda.synchronize()
    return found


def in_turns(runs: Mapping[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
    """Return microseconds of runs made in turns, with cold caches."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    other = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    for turn in range(-1, TURNS):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            marks = []
            for _ in range(RUNS):
                for _ in range(FLUSHES):
                    other.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                runs[name]()
                end.record()
                marks.append((start, end))
            torch.cuda.synchronize()
            if turn >= 0:
                spent = [start.elapsed_time(end) for start, end in marks]
                times[name].append(1e3 * statistics.mean(spent))
    return times


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """Run recipes on the demo, with the first tokens of the calibration text alone."""
    tokenizer = load_tokenizer(ProgramModel(capture("demo")))
    text = read_text(options.calib)
    ends = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    with tempfile.TemporaryDirectory() as work:
        calib = Path(work) / options.calib.name
        calib.write_text(text[: ends[LEARNT - 1][1]], encoding="utf-8")
        found = run_recipes(
            options.recipe or RECIPES, calib=calib, text=options.text,
            device=torch.device(options.device), windows=options.windows, piqa=options.piqa,
            seed=options.seed, save=lambda found: save(options, found), more=experts_run,
        )  # fmt: skip
    return {"learnt_tokens": LEARNT, **found}


def experts_run(program: Program, windows: Tensor, device: torch.device) -> dict[str, Any]:
    """Return how many experts a token runs, over all parts: thresholds only aim at a number."""
    loads = expert_loads(program, windows[:COUNTED], device)
    numbers = [sum(load) for _, load in loads]
    return {"experts_run": statistics.mean(numbers)} if numbers else {}


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """Carve a Llama-7B with random weights by 8 windows of 2,048 random tokens."""
    device = torch.device("cuda")
    program = random_llama(device)
    ids = torch.randint(0, 32000, (8 * 2048,), generator=torch.Generator().manual_seed(0))
    # The text that a model without tokenizer has written.
    context = Context(device=device, built_in=True, written=ids)
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = make_pass("carve-moe", {"windows": 8, "seqlen": 2048}).run(program, context)
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated()
    print(f"{result.changed} parts carved: {seconds:.1f} s, {peak / 1e9:.1f} GB")
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "carved": result.changed,
        "details": brief(result.record.to_json() if result.record is not None else {}),
    }


PARTS = {"ffn": ffn, "quality": quality, "shape": shape}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--calib", type=Path, help="calibration text")
    parser.add_argument("--text", type=Path, help="evaluation text")
    parser.add_argument("--piqa", type=Path, help="questions, as for graphopt eval --piqa")
    parser.add_argument("--windows", type=int, help="of the evaluation text; all by default")
    parser.add_argument("--recipe", action="append", help="instead of the bench's own")
    parser.add_argument("--device", default="cuda", help="of quality; the other parts need a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "width.json")
    options = parser.parse_args()
    if options.part == "quality" and (options.calib is None or options.text is None):
        parser.error("give texts with --calib and --text")
    save(options, PARTS[options.part](options))


def save(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    command = ["python tools/bench_experts.py", options.part, "--device", options.device]
    command += [
        f"--{option} {getattr(options, option).name}"
        for option in ("calib", "text", "piqa")
        if getattr(options, option) is not None
    ]
    command += [f"--windows {options.windows}"] if options.windows else []
    command += [f"--seed {options.seed}"] if options.seed else []
    command += [f"--recipe '{recipe}'" for recipe in options.recipe or ()]
    keep(options.out, options.part, command, torch.device(options.device), found)


if __name__ == "__main__":
    main()
