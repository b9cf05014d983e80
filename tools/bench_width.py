"""Measure models carved into experts beside dense ones.

    python tools/bench_width.py onnx --calib FILE      # prefill and decoding in ONNX Runtime

Each part is kept in benchmarks/width.json beside what other parts, and other devices, gave.
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

import numpy as np
import onnxruntime
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import keep

import graphopt as go
from graphopt.backends.onnx_artifact import OnnxArtifactModel
from graphopt.calibration.text import text_windows
from graphopt.capture import capture
from graphopt.evaluate.perplexity import read_text
from graphopt.execute.hidden_states import HiddenStateStream
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.ir.blocks import find_blocks, sub_blocks
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.feed_forward import FeedForward, feed_forwards
from graphopt.ir.graph import Call, Function, Program, Value
from graphopt.ir.shapes import infer_program

ROOT = Path(__file__).resolve().parent.parent
SPLITS = {
    "S3A3E8": "carve-moe{shared=3,active=3,experts=8}",
    "S2A2E16": "carve-moe{shared=2,active=2,experts=16}",
}
TOKENS = 512
TURNS = 15


def onnx(options: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decode with dense and carved graphs in turns, whole and their FFN parts alone.

    `moe` is what the carved ones take with com.microsoft::MoE for the experts. Threads do not
    spin between operators.
    """
    dense = capture("demo")
    ids = text_windows(dense, read_text(options.calib), TOKENS)[-1:]
    found: dict[str, Any] = {"tokens": TOKENS, "threads": options.threads, "splits": {}}
    for split, recipe in SPLITS.items():
        passes = f"{recipe},{go.Pipeline.default()}"
        carved, _ = go.Pipeline.parse(passes).run(
            dense, go.RunOptions(calib=options.calib, verify=False)
        )
        plain, _ = go.Pipeline.parse(str(go.Pipeline.default())).run(
            dense, go.RunOptions(verify=False)
        )
        with tempfile.TemporaryDirectory(prefix="bench-width-") as work:
            folder = Path(work)
            measured = {
                "recipe": recipe,
                **ffn_alone(plain, carved, ids, folder, options.threads),
                **whole_models(
                    {"dense": plain, "carved": carved, "moe": carved}, ids, folder, options.threads
                ),
            }
        found["splits"][split] = measured
        for part in ("ffn", "ffn of one token", "prefill", "decode"):
            print(f"{split} {part}: {measured[part]['share']}", flush=True)
        # A later split may be cut off.
        save(options, found)
    return found


def session(folder: Path, threads: int) -> onnxruntime.InferenceSession:
    """Return a session whose threads do not spin: a run in turn with others takes their cores."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), settings)


def write(program: Program, folder: Path, name: str) -> None:
    """Emit a program; as `moe` all of its experts are com.microsoft::MoE."""
    moe = name == "moe"
    go.emit(program, folder, emit=("onnx",), onnx_moe=moe, strict=moe)


def whole_models(
    programs: Mapping[str, Program], ids: Tensor, folder: Path, threads: int
) -> dict[str, Any]:
    """Time prefill and the steps behind it of whole models."""
    models = {}
    for name, program in programs.items():
        write(program, folder / name, name)
        models[name] = OnnxArtifactModel(folder / name / "onnx")
        models[name]._session = session(folder / name / "onnx", threads)
    runs = {name: functools.partial(decode_runs, model, ids) for name, model in models.items()}
    prefill = {
        name: functools.partial(model.step, complete_inputs({"input_ids": ids}), model.start(1))
        for name, model in models.items()
    }
    return {"prefill": in_turns(prefill), "decode": in_turns(runs, seconds_of=True)}


def decode_runs(model: OnnxArtifactModel, ids: Tensor, prompt: int = 64, count: int = 16) -> float:
    """Return the seconds of a step of one token."""
    logits, cache = model.step(complete_inputs({"input_ids": ids[:, :prompt]}), model.start(1))
    started = time.perf_counter()
    for done in range(count):
        token = logits[:, -1:].argmax(-1)
        logits, cache = model.step(complete_inputs({"input_ids": token}, prompt + done), cache)
    return (time.perf_counter() - started) / count


def in_turns(runs: Mapping[str, Callable[[], Any]], *, seconds_of: bool = False) -> dict[str, Any]:
    """Return seconds of runs made in turns, and what they are of the dense one's.

    Each run is made twice in its turn, and timed the second time: caches hold its own weights, as
    where one model runs alone. A share is the median of those of the turns, for a machine is not
    equally fast from one minute to the next.

    Args:
        seconds_of: A run returns its seconds itself.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            runs[name]()
            started = time.perf_counter()
            own = runs[name]()
            times[name].append(own if seconds_of else time.perf_counter() - started)
    share = {
        name: statistics.median(
            own / dense for own, dense in zip(found, times["dense"], strict=True)
        )
        for name, found in times.items()
    }
    return {"seconds": times, "share": share}


def ffn_alone(
    dense: Program, carved: Program, ids: Tensor, folder: Path, threads: int
) -> dict[str, Any]:
    """Time the feed-forward parts alone, on what they get in the carved model."""
    parts = ffn_program(carved)
    feeds = {"input_ids": ids.numpy(), **ffn_inputs(carved, ids)}
    sessions = {}
    for name, program in (("dense", ffn_program(dense)), ("carved", parts), ("moe", parts)):
        write(program, folder / f"ffn-{name}", name)
        sessions[name] = session(folder / f"ffn-{name}" / "onnx", threads)
    ours, theirs = (sessions[name].run(None, feeds)[0] for name in ("carved", "moe"))
    # Sums of the same products in another order.
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(ours).max()
    last = {name: np.ascontiguousarray(value[:, -1:]) for name, value in feeds.items()}
    return {
        part: in_turns(
            {name: functools.partial(s.run, None, given) for name, s in sessions.items()}
        )
        for part, given in (("ffn", feeds), ("ffn of one token", last))
    }


def ffn_values(function: Function, stream: int) -> tuple[Value, list[Value]]:
    """Return what a block's feed-forward part reads, and the terms it adds to the stream."""
    terms = [part.term for part in sub_blocks(function, stream) if part.kind == "ffn"]
    for node in function.nodes:
        if node.op == "experts":
            assert node.inputs[0] is not None
            return node.inputs[0], terms
    (part,) = feed_forwards(function, stream)
    assert isinstance(part, FeedForward)
    return part.x, terms


def ffn_program(program: Program) -> Program:
    """Return the sum of a program's feed-forward parts, each of an input x0, x1, ... of its own."""
    made = Program("ffn", inputs={"input_ids": program.inputs["input_ids"]}, outputs=["logits"])
    made.weights = program.weights.copy()
    kinds, _ = infer_program(program)
    total = ""
    for number, block in enumerate(find_blocks(program)):
        call = program.calls[block.position]
        function = program.functions[call.function]
        x, terms = ffn_values(function, block.stream)
        clone = function.clone(f"ffn{number}")
        ours = dict(zip(function.values(), clone.values(), strict=True))
        clone.caches, clone.params = [], [Value("x")]
        clone.replace(ours[x], clone.params[0])
        if total:
            clone.params.append(Value("total"))
        out, *rest = [*clone.params[1:], *(ours[term] for term in terms)]
        for term in rest:
            out = clone.add("add", [out, term]).output
        clone.results = [out]
        remove_dead(clone)
        made.functions[clone.name] = clone
        made.inputs[f"x{number}"] = kinds[block.position][x]
        args = [f"x{number}", *([total] if total else [])]
        total = f"total{number}"
        used = {slot: name for slot, name in call.weights.items() if slot in clone.weights}
        made.calls.append(Call(clone.name, args, [total], used, dict(call.attrs), {}, call.path))
    made.calls[-1].results = ["logits"]
    made.prune_unused()
    return made


def ffn_inputs(program: Program, ids: Tensor) -> dict[str, Any]:
    """Return what the feed-forward parts of a program read, by the names of `ffn_program`."""
    inputs: dict[str, Any] = {}
    stream = HiddenStateStream(Runner(program, keep_weights=False), ids, tokens_at_once=ids.numel())
    for block in stream:
        x, _ = ffn_values(block.function, block.block.stream)
        inputs[f"x{block.index}"] = block.values(0, [x])[0].numpy()
    return inputs


PARTS = {"onnx": onnx}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--calib", type=Path, required=True, help="calibration text")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "width.json")
    options = parser.parse_args()
    save(options, PARTS[options.part](options))


def save(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    command = ["python tools/bench_width.py", options.part, f"--calib {options.calib.name}"]
    command.append(f"--threads {options.threads}")
    keep(options.out, options.part, command, torch.device("cpu"), found)


if __name__ == "__main__":
    main()
