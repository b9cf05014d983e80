"""Measure how fast the emitted model decodes one text, beside transformers, on one device.

    python tools/bench_decode.py [--target hopper] [--tokens 128] [--out benchmarks/decode.json]

The demo model in bf16, a greedy answer of one length to one prompt, in one process:

* `graphopt`: the emitted package, `Decoder` with its recorded step;
* `generate`: transformers' `generate` with scaled_dot_product_attention;
* `compiled`: transformers' model with a static cache, its one-token step and choice of a token
  under `torch.compile(mode="reduce-overhead")`.

Everything is compiled and recorded before anything is timed, runs are taken in turns, and the
prompt is read anew in every run. Without a GPU nothing is compiled and the dtype is fp32: that
says only whether this script runs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import target_here

from graphopt.targets import all_targets

ROOT = Path(__file__).parents[1]
GPUS = [target.name for target in all_targets().values() if target.kind == "gpu"]
PROMPT = "Once upon a time, in a small village by the sea,"
REPEATS = 5
PACKAGES = ("torch", "transformers", "numpy")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
Answer = Callable[[list[int], int], list[int]]


def graphopt(*arguments: str) -> None:
    code = "from graphopt.cli.commands import main; main()"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)


def checkpoint(work: Path) -> Path:
    """Write the demo as a checkpoint in the dtype of the comparison; return its folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    graphopt("compile", "demo", "-o", str(work / "demo"), "--emit", "hf", "--no-verify")
    source, folder = work / "demo" / "hf", work / "checkpoint"
    AutoModelForCausalLM.from_pretrained(source, dtype=DTYPE).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def emitted(folder: Path, out: Path, target: str) -> ModuleType:
    """Compile a checkpoint for a target and return its `model.py`."""
    graphopt("compile", str(folder), "-o", str(out), "--target", target, "--no-verify")
    spec = importlib.util.spec_from_file_location("emitted", out / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_decoder(module: ModuleType, capacity: int) -> Answer:
    """Return what answers with the emitted package."""
    decoder = module.Decoder(module.load(device=DEVICE), capacity)
    assert next(decoder.model.parameters()).dtype == DTYPE

    def answer(ids: list[int], count: int) -> list[int]:
        tokens = [decoder.start(ids)]
        while len(tokens) < count:
            tokens.append(decoder.step())
        return tokens

    return answer


def by_generate(model: Any) -> Answer:
    """Return what answers with transformers' `generate`."""

    def answer(ids: list[int], count: int) -> list[int]:
        prompt = torch.tensor([ids], device=DEVICE)
        mask = torch.ones_like(prompt)
        made = model.generate(
            prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return made[0, len(ids) :].tolist()

    return answer


def by_static_cache(model: Any, capacity: int) -> Answer:
    """Return what answers with a static cache and a compiled step."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=capacity)

    def step(token: Tensor, position: Tensor) -> Tensor:
        logits = model(token, position_ids=position, past_key_values=cache, use_cache=True).logits
        return logits[:, -1:].argmax(-1)

    recorded = torch.compile(step, mode="reduce-overhead", fullgraph=True) if ON_GPU else step

    @torch.no_grad()
    def answer(ids: list[int], count: int) -> list[int]:
        cache.reset()
        positions = torch.arange(capacity, device=DEVICE)[None]
        token = step(torch.tensor([ids], device=DEVICE), positions[:, : len(ids)])
        tokens = [int(token)]
        for place in range(len(ids), len(ids) + count - 1):
            token = recorded(token.clone(), positions[:, place : place + 1].clone())
            tokens.append(int(token))
        return tokens

    return answer


def seconds(answer: Answer, ids: list[int], count: int) -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    answer(ids, count)
    return time.perf_counter() - start


def measure(target: str, count: int, work: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoint(work)
    module = emitted(folder, work / "emitted", target)
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPE, attn_implementation="sdpa"
    )
    model = model.to(DEVICE).eval()
    # Lengths alone end an answer, so that everyone does the same work.
    model.generation_config.eos_token_id = None
    capacity = len(ids) + count
    answers = {
        "graphopt": by_decoder(module, capacity),
        "generate": by_generate(model),
        "compiled": by_static_cache(model, capacity),
    }
    tokens = {name: answer(ids, count) for name, answer in answers.items()}
    assert all(len(made) == count for made in tokens.values())
    for answer in answers.values():
        answer(ids, count)
    speeds: dict[str, list[float]] = {name: [] for name in answers}
    for turn in range(REPEATS):
        for name in list(answers)[:: -1 if turn % 2 else 1]:
            speeds[name].append(count / seconds(answers[name], ids, count))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    return {
        "command": f"python tools/bench_decode.py --target {target} --tokens {count}",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if ON_GPU else f"{platform.machine()} CPU",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES}
        | ({"triton": metadata.version("triton")} if ON_GPU else {}),
        "summary": {
            "tokens_per_second": medians,
            "times_generate": medians["graphopt"] / medians["generate"],
            "times_compiled": medians["graphopt"] / medians["compiled"],
            # Another order of adding up may turn two tokens that are about as likely.
            "equal_tokens_from_the_first": {
                name: equal_from_the_first(tokens["generate"], made)
                for name, made in tokens.items()
            },
        },
        "dtype": str(DTYPE).removeprefix("torch."),
        "target": target,
        "prompt_tokens": len(ids),
        "new_tokens": count,
        "tokens_per_second": speeds,
    }


def equal_from_the_first(a: list[int], b: list[int]) -> int:
    """Return how many tokens are equal before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "decode.json")
    parser.add_argument("--target", choices=GPUS, default=target_here())
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-decode-"))
    try:
        result = measure(args.target, args.tokens, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
