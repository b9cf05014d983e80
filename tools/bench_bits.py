"""Measure rounding to few bits behind every kind of transform, on one model, as one table.

    python tools/bench_bits.py --calib FILE --text FILE [--piqa FILE] [--device cuda]
                               [--models NAME=MODEL ...] [--methods NAME;NAME] [--seeds 0,1,2]
                               [--seconds 300 | --steps N] [--windows N] [--bits 4,4,4]
    python tools/bench_bits.py --block --calib FILE [--device cuda] [--steps 240]

A model is what the command line of graphopt takes; `demo` by default. Rows are transforms: none,
scales, Hadamard, random orthogonal, closed form, learned block by block, and learned with all
weights distilled; with and without clips, weights rounded to nearest and by GPTQ. With questions,
perplexity on their texts is measured too, which are of another kind than the others. Each run is
kept in benchmarks/bits.json with its recipe, seed and seconds. `--block` trains one block of
Llama-2-7B's shape, with random weights, and tells its seconds and the memory that it takes at most.
"""

from __future__ import annotations

import argparse
import shlex
import string
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ablation_tables import ablation_table
from measure import LLAMA_7B, Yardstick, keep, random_llama, run_recipe

import graphopt as go
from graphopt.calibration.text import text_windows
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.ir.graph import Program

ROOT = Path(__file__).resolve().parent.parent


def _fixed(kind: str, clip: bool, rounding: str) -> str:
    options = f"kind={kind},steps=0,clip={str(clip).lower()},rounding={rounding}"
    return f"flatquant{{$bits,{options}}}"


def _learned(options: str) -> str:
    return f"flatquant{{$bits,$training,{options}}}"


METHODS: dict[str, str] = {
    f"{name}{', clips' if clip else ''}, {rounding.upper()}": _fixed(kind, clip, rounding)
    for kind, name in (
        ("none", "no transform"),
        ("scale", "scales"),
        ("hadamard", "Hadamard"),
        ("random", "random orthogonal"),
        ("closed", "closed form"),
    )
    for clip in (False, True)
    for rounding in ("rtn", "gptq")
} | {
    "learned, RTN": _learned("distil=0,clip=false"),
    "learned, clips, RTN": _learned("distil=0"),
    "learned, clips, GPTQ": _learned("distil=0,rounding=gptq"),
    "learned from rounded inputs, clips, RTN": _learned("distil=0,inputs=rounded"),
    "learned from a Hadamard start, clips, RTN": _learned("distil=0,start=hadamard"),
    "learned as published, RTN": _learned("method=published"),
    "learned, clips, distilled, RTN": _learned("distil=0.4"),
    "learned, clips, distilled for longer, RTN": _learned("distil=0.7"),
    "weights alone, GPTQ": "quantize{w=4}",
    "weights alone, groups of 32, GPTQ": "quantize{w=4,group=32}",
    "weights alone, scaled, GPTQ": "quantize{w=4,scale=true}",
    "weights alone, groups of 32, scaled, GPTQ": "quantize{w=4,group=32,scale=true}",
    "weights alone, GPTQ, codes trained": "quantize{w=4},tune-codes{$training}",
    "weights alone, groups of 32, GPTQ, codes trained":
        "quantize{w=4,group=32},tune-codes{$training}",
    "no transform, GPTQ, codes trained": "quantize{$bits},tune-codes{$training}",
    "weights alone, learned, distilled, RTN":
        "flatquant{w=4,a=16,kv=16,$training,distil=0.7}",
    "weights alone, groups of 32, learned, distilled, RTN":
        "flatquant{w=4,a=16,kv=16,group=32,$training,distil=0.7}",
    "keys and values alone": "quantize{w=16,kv=4}",
    "keys and values alone, closed form": "flatquant{w=16,a=16,kv=4,kind=closed,steps=0}",
    "keys and values alone, learned, distilled":
        "flatquant{w=16,a=16,kv=4,$training,distil=0.6}",
}  # fmt: skip
"""Rows of the table: recipes, with $bits and how long a $training lasts."""


def measure(name: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the methods on a model, and keep each run."""
    device = torch.device(options.device)
    dense = capture(model)
    yardstick = Yardstick.of(dense, options.text, device, options.windows, options.piqa)
    base = yardstick.measure(dense)
    other = None if options.piqa is None else piqa_texts(dense, yardstick)
    if other is not None:
        base["piqa_texts"] = other.measure(dense)["perplexity"]
    print(f"{name}: dense {base}", flush=True)
    found: dict[str, Any] = {
        "dense": base,
        "text": options.text.name,
        "calib": options.calib.name,
        "windows": list(yardstick.windows.shape),
        "bits": options.bits,
        "training": training_of(options),
        "runs": [],
    }
    w, a, kv = options.bits
    for seed in options.seeds:
        for method in options.methods:
            recipe = string.Template(METHODS[method]).substitute(
                bits=f"w={w},a={a},kv={kv}", training=training_of(options)
            )
            about = {"method": method, "seed": seed, "recipe": recipe}
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            try:
                program, record = run_recipe(
                    dense, recipe, options.calib, yardstick, base["perplexity"], seed
                )
                if other is not None:
                    record["piqa_texts"] = other.measure(program)["perplexity"]
                    record["piqa_texts_times_dense"] = record["piqa_texts"] / base["piqa_texts"]
            except GraphoptError as error:
                record = {"refused": str(error)}
            except Exception as error:  # a bug, which is told; the other runs are worth their time
                traceback.print_exc()
                record = {"failed": f"{type(error).__name__}: {error}"}
            if device.type == "cuda":
                record["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            found["runs"].append({**about, **record})
            outcome = record.get("refused") or record.get("failed")
            if outcome is None:
                outcome = ", ".join(f"{key} {record[key]:.4g}" for key in (*base, "times_dense"))
                outcome += f", {record['seconds']:.1f} s"
            print(
                f"{name}: {method}, seed {seed}: {outcome} "
                f"({time.perf_counter() - started:.0f} s with measuring)",
                flush=True,
            )
            save(name, options, found)
    return found


def piqa_texts(dense: Program, yardstick: Yardstick) -> Yardstick:
    """Return what measures perplexity on PIQA's goals and right solutions: text of another kind."""
    assert yardstick.questions is not None
    lines = [f"{row.goal} {row.solutions[row.label]}" for row in yardstick.questions]
    windows = text_windows(dense, "\n".join(lines), yardstick.windows.shape[1])
    return Yardstick(windows, None, yardstick.device, yardstick.at_once)


def measure_block(options: argparse.Namespace) -> dict[str, Any]:
    """Train a block of Llama-2-7B's shape; its weights are random, and read by a real tokenizer."""
    device = torch.device(options.device)
    demo = capture("demo")
    vocabulary = demo.config["vocab_size"]
    program = random_llama(device, LLAMA_7B | {"num_hidden_layers": 1, "vocab_size": vocabulary})
    program.tokenizer = demo.tokenizer
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = options.steps or 240
    recipe = f"flatquant{{distil=0,steps={steps}}}"
    _, report = go.Pipeline.parse(recipe).run(
        program, go.RunOptions(calib=options.calib, device=device, verify=False)
    )
    record = report.passes[-1].details
    found: dict[str, Any] = {
        "recipe": recipe,
        "steps": steps,
        "seconds": record["seconds"],
        "minutes_for_32_blocks": 32 * record["seconds"]["training blocks"] / 60,
        "blocks": record["blocks"],
    }
    if device.type == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    command = f"python tools/bench_bits.py --block --calib {options.calib.name}"
    more = f"--device {options.device} --steps {steps}"
    keep(options.out, "block", [command, more], device, found)
    return found


def training_of(options: argparse.Namespace) -> str:
    """Return how long trainings last, as the text of an option."""
    steps, seconds = options.steps, options.seconds
    return f"seconds={seconds:g}" if steps is None else f"steps={steps}"


def save(name: str, options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    command = [
        "python tools/bench_bits.py",
        f"--models {shlex.quote(name)} --device {options.device}",
    ]
    command += [
        f"--{option} {getattr(options, option).name}"
        for option in ("calib", "text", "piqa")
        if getattr(options, option) is not None
    ]
    command += [f"--windows {options.windows}"] if options.windows else []
    training = training_of(options).replace("=", " ")
    command.append(f"--seeds {','.join(map(str, options.seeds))} --{training}")
    command.append(f"--bits {','.join(map(str, options.bits))}")
    keep(options.out, name, command, torch.device(options.device), found)


def named(models: Sequence[str]) -> dict[str, str]:
    """Return the models that are asked for, by the names under which they are kept."""
    pairs = [model.rpartition("=") for model in models]
    return {name or Path(place).stem: place for name, _, place in pairs}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["demo"], help="NAME=MODEL")
    parser.add_argument("--calib", type=Path, required=True, help="calibration text")
    parser.add_argument("--text", type=Path, help="evaluation text")
    parser.add_argument("--piqa", type=Path, help="questions, as for graphopt eval --piqa")
    parser.add_argument("--methods", default="", help="names, with semicolons; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, help="of the evaluation text; all by default")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--seconds", type=float, default=300.0, help="of each training")
    parser.add_argument("--bits", default="4,4,4", help="of weights, activations, keys and values")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "bits.json")
    parser.add_argument("--block", action="store_true", help="train one block of 7B's shape alone")
    parser.add_argument("--steps", type=int, help="of each training, in place of seconds")
    options = parser.parse_args()
    if options.block:
        for key, value in measure_block(options).items():
            print(f"{key}: {value}")
        return
    if options.text is None:
        parser.error("give the evaluation text with --text")
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.bits = [int(bits) for bits in options.bits.split(",")]
    options.methods = options.methods.split(";") if options.methods else list(METHODS)
    unknown = sorted(set(options.methods) - set(METHODS))
    if unknown:
        parser.error(f"no methods {unknown}; there are {'; '.join(METHODS)}")
    for name, model in named(options.models).items():
        print(ablation_table(measure(name, model, options)), flush=True)


if __name__ == "__main__":
    main()
