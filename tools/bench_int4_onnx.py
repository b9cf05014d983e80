"""Decode with 4-bit ONNX weights beside onnxruntime-genai's int4 builder model, in one run.

    python tools/bench_int4_onnx.py --calib valid.txt --text test-dev.txt [--model demo]

What is measured, of our graph at each accuracy level of MatMulNBits and of the builder's int4 model
of the same weights: size, tokens a second under onnxruntime-genai (in turns, each in a process of
its own), and perplexity on the same windows of the text. Of our graphs beside that: at how many
positions the likeliest token is that of the same rounded weights computed in fp32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from genai_speed import decode_speed
from results import given_words

PROMPT = "Once upon a time, in a small village by the sea,"
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai", "numpy")
LEVELS = (1, 4)


def all_logits(folder: Path, windows: list[list[int]]) -> list[Any]:
    """Return the logits [S, vocab] of windows of ids, by the graph that genai decodes with."""
    import numpy as np
    import onnxruntime

    config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(
        str(folder / config["filename"]), options, providers=["CPUExecutionProvider"]
    )
    found: list[Any] = []
    for ids in windows:
        feeds: dict[str, Any] = {}
        for item in session.get_inputs():
            if item.name == "input_ids":
                feeds[item.name] = np.array([ids], np.int64)
            elif item.name == "attention_mask":
                feeds[item.name] = np.ones((1, len(ids)), np.int64)
            elif item.name == "position_ids":
                feeds[item.name] = np.arange(len(ids), dtype=np.int64)[None]
            else:
                shape = (1, config["num_key_value_heads"], 0, config["head_size"])
                feeds[item.name] = np.zeros(shape, np.float32)
        found.append(session.run(["logits"], feeds)[0][0])
    return found


def quality(folder: Path, windows: list[list[int]]) -> dict[str, Any]:
    """Return the perplexity of windows under a model, and the likeliest token at each position."""
    import numpy as np

    loss, count, greedy = 0.0, 0, []
    for ids, logits in zip(windows, all_logits(folder, windows), strict=True):
        rows = logits[:-1].astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        chosen = rows[np.arange(len(rows)), ids[1:]]
        loss -= float((chosen - np.log(np.exp(rows).sum(-1))).sum())
        count += len(rows)
        greedy += logits.argmax(-1).tolist()
    return {"perplexity": math.exp(loss / count), "greedy": greedy}


def agreement(one: list[int], other: list[int]) -> float:
    """Return the share of positions with the same token."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def run(command: list[str]) -> None:
    """Run a command; end where it fails, with the end of what it said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def size(folder: Path) -> int:
    """Return the bytes of a model's graph and weights, as genai reads them."""
    config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    graph = folder / config["filename"]
    return sum(path.stat().st_size for path in (graph, *folder.glob("*.onnx.data")))


def windows_of(checkpoint: Path, text: Path, count: int, length: int) -> list[list[int]]:
    """Return the first windows of a text, as ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    characters = text.read_text(encoding="utf-8")[: 8 * count * length]
    ids = tokenizer(characters, verbose=False)["input_ids"]
    return [ids[start : start + length] for start in range(0, count * length, length)]


def measure(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    graphopt = ["graphopt", "compile", args.model, "--no-verify"]
    run([*graphopt, "-o", str(work / "dense"), "--emit", "hf,onnx"])
    checkpoint = work / "dense" / "hf"
    recipe = f"quantize{{w=4,group={args.group},head=4,embedding=4{args.options}}}"
    compiled = work / "ours"
    calib = ["--calib", str(args.calib)]
    run([*graphopt, *calib, "-o", str(compiled), "--emit", "onnx", "--passes", recipe])
    folders = {"dense": work / "dense" / "onnx"}
    for level in LEVELS:
        folders[f"level {level}"] = work / f"level{level}" / "onnx"
        # The same codes, which are chosen once.
        again = ["graphopt", "compile", str(compiled), "--no-verify", "--passes", ""]
        out = ["-o", str(work / f"level{level}"), "--emit", "onnx"]
        run([*again, *out, "--onnx-accuracy", str(level)])
    for name, extra in {
        "builder": [],
        "builder, level 1": ["--extra_options", "accuracy_level=1"],
    }.items():
        folders[name] = work / name.replace(", ", "-").replace(" ", "-")
        run([sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint),
             "-o", str(folders[name]), "-p", "int4", "-e", "cpu", "-c", str(work / "cache"),
             *extra])  # fmt: skip

    windows = windows_of(checkpoint, args.text, args.windows, args.seqlen)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        found = {
            name: processes.submit(quality, folder, windows).result()
            for name, folder in folders.items()
        }
        from transformers import AutoTokenizer

        prompt = AutoTokenizer.from_pretrained(checkpoint)(PROMPT)["input_ids"]
        speeds: dict[str, list[float]] = {name: [] for name in folders}
        for turn in range(args.turns):
            for name, folder in list(folders.items())[:: -1 if turn % 2 else 1]:
                submitted = processes.submit(
                    decode_speed, folder, prompt, args.tokens, args.repeats
                )
                speeds[name] += submitted.result()
    exact = found["level 1"]["greedy"]
    return {
        "command": "python tools/bench_int4_onnx.py " + given_words(),
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {platform.system()}",
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "recipe": recipe,
        "windows": [args.windows, args.seqlen],
        "models": {
            name: {
                "bytes": size(folder),
                "perplexity": found[name]["perplexity"],
                "greedy_as_level_1": agreement(found[name]["greedy"], exact),
                "greedy_as_dense": agreement(found[name]["greedy"], found["dense"]["greedy"]),
                "tokens_per_second": statistics.median(speeds[name]),
            }
            for name, folder in folders.items()
        },
        "positions": len(exact),
        "decode_runs": speeds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--options", default="", help="more options of quantize: ',windows=8'")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/int4_onnx.json"))
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-int4-"))
    try:
        result = measure(work, args)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["models"], indent=2))


if __name__ == "__main__":
    main()
