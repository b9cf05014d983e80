"""Compile the demo and measure it beside onnxruntime-genai's model builder, in one run.

    python tools/bench_demo.py [--out benchmarks/demo.json]

What is measured: wall time and peak memory of `graphopt compile demo` with and without
verification and of the builder on the same weights; greedy tokens of both ONNX models under
onnxruntime-genai against transformers' `generate` in fp32; decode speed of both, taken in turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from genai_speed import decode_speed

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics state that",
    "Question: What do plants need to grow?\nAnswer:",
)
TOKENS = 64
REPEATS = 3
TURNS = 6
PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "numpy")


def run(command: list[str]) -> dict[str, Any]:
    """Run a command and return its wall seconds and peak resident bytes."""
    # What others left to be written would be waited for here.
    os.sync()
    # Modules are compiled once, as those of an installed package are.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    assert process.stderr is not None
    log = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"{' '.join(command)} failed:\n{log.decode()[-2000:]}")
    seconds = time.perf_counter() - start
    # Folders are temporary ones, and named as if that were where one is.
    place = re.compile(rf"{re.escape(tempfile.gettempdir())}/bench-demo-\w+/")
    named = shlex.join(
        ["python" if part == sys.executable else place.sub("", part) for part in command]
    )
    return {"command": named, "seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024}


def greedy(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return what onnxruntime-genai decodes greedily after each prompt."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    answers: list[list[int]] = []
    for ids in prompts:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + TOKENS, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        answers.append([int(token) for token in generator.get_sequence(0)][len(ids) :])
    return answers


def decode_speeds(folders: dict[str, Path], prompt: list[int]) -> dict[str, list[float]]:
    """Return tokens per second of every model, each time in a process of its own, in turns.

    Two models in one process differ by several percent in where their weights come to lie.
    """
    speeds: dict[str, list[float]] = {name: [] for name in folders}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for turn in range(TURNS):
            for name, folder in list(folders.items())[:: -1 if turn % 2 else 1]:
                speeds[name] += processes.submit(
                    decode_speed, folder, prompt, TOKENS, REPEATS
                ).result()
    return speeds


def reference_tokens(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Return the prompts' ids and what transformers generates in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    answers: list[list[int]] = []
    for ids in prompts:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=TOKENS,
                do_sample=False,
            )
        answers.append(out[0, len(ids) :].tolist())
    return prompts, answers


def trimmed(tokens: list[int], ends: list[int]) -> list[int]:
    """Return the tokens before the end-of-text token."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/demo.json"))
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-demo-"))
    try:
        result = measure(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["summary"], indent=2))


def measure(work: Path) -> dict[str, Any]:
    compile_ = ["graphopt", "compile", "demo", "-o"]
    run([*compile_, str(work / "all"), "--emit", "hf", "--no-verify"])
    checkpoint = work / "all" / "hf"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
    runs: dict[str, list[dict[str, Any]]] = {"builder": [], "unverified": [], "verified": []}
    for repeat in range(3):
        peer, plain, full = (str(work / f"{name}{repeat}") for name in ("peer", "plain", "full"))
        cache = str(work / f"cache{repeat}")
        commands = {
            "builder": [*builder, "-o", peer, "-p", "fp32", "-e", "cpu", "-c", cache],
            "unverified": [*compile_, plain, "--no-verify"],
            "verified": [*compile_, full],
        }
        # Each is first once.
        turns = list(commands)[repeat:] + list(commands)[:repeat]
        for name in turns:
            runs[name].append(run(commands[name]))
        shutil.rmtree(plain)
        if repeat:
            shutil.rmtree(peer)
            shutil.rmtree(full)
    ours, peer_folder = work / "full0" / "onnx", work / "peer0"
    prompts, expected = reference_tokens(checkpoint)
    ends = json.loads((ours / "genai_config.json").read_text())["model"]["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    answers = {"graphopt": greedy(ours, prompts), "builder": greedy(peer_folder, prompts)}
    equal = {
        name: [trimmed(a, ends) == trimmed(e, ends) for a, e in zip(got, expected, strict=True)]
        for name, got in answers.items()
    }
    speeds = decode_speeds({"graphopt": ours, "builder": peer_folder}, prompts[1])
    medians = {
        f"{name}_{key}": statistics.median(item[key] for item in items)
        for name, items in runs.items()
        for key in ("seconds", "peak_bytes")
    }
    return {
        "command": "python tools/bench_demo.py",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "summary": {
            **medians,
            "prompts_with_equal_tokens": {name: sum(found) for name, found in equal.items()},
            "prompts": len(PROMPTS),
            "decode_tokens_per_second": {n: statistics.median(s) for n, s in speeds.items()},
        },
        "compile_runs": runs,
        "decode_runs": speeds,
        "equal_tokens": equal,
    }


if __name__ == "__main__":
    main()
