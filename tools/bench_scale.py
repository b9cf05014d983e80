"""Measure that time and memory don't grow with a model: inspect 70B, compile 1.5B.

    python tools/bench_scale.py [--out benchmarks/scale.json]

`graphopt inspect --config` of a Llama of 80 layers and hidden size 8192: wall time and peak
resident memory. `graphopt compile --emit hf --passes ''` of a random checkpoint of 1.5 billion
parameters in bf16 in several shards: peak anonymous memory (RssAnon) above that of a process which
has imported the same modules and does nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

REPEATS = 3
PACKAGES = ("graphopt", "torch", "transformers", "sympy", "networkx")
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
QWEN_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
IMPORTS = """
import graphopt.compiler, graphopt.capture.assemble, graphopt.capture.conversion
import graphopt.lowering.hf, graphopt.pass_manager.pipeline, torch._export, torch.export
from transformers import AutoModelForCausalLM, AutoTokenizer, {model}
import time; time.sleep(3)
"""
INTERVAL = 0.01


def measured(command: list[str]) -> dict[str, Any]:
    """Run a command; return wall seconds, peak resident and peak anonymous bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = {"VmHWM": 0, "RssAnon": 0}

    def sample() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                key, _, rest = line.partition(":")
                if key in peak:
                    peak[key] = max(peak[key], int(rest.split()[0]) * 1024)
            time.sleep(INTERVAL)

    sampler = threading.Thread(target=sample)
    sampler.start()
    assert process.stderr is not None
    log = process.stderr.read()
    code = process.wait()
    sampler.join()
    if code:
        sys.exit(f"{' '.join(command)} failed:\n{log.decode()[-2000:]}")
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak["VmHWM"],
        "peak_anonymous_bytes": peak["RssAnon"],
    }


def random_checkpoint(folder: Path) -> int:
    """Write a random checkpoint in shards and return its number of parameters."""
    code = f"""
import torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(0)
config = AutoConfig.for_model("qwen2", **{QWEN_1_5B!r})
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
print(sum(parameter.numel() for parameter in model.parameters()))
model.save_pretrained({str(folder)!r}, max_shard_size="420MB")
"""
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/scale.json"))
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-scale-"))
    try:
        result = measure(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["summary"], indent=2))


def measure(work: Path) -> dict[str, Any]:
    config = work / "llama70b.json"
    config.write_text(json.dumps(LLAMA_70B))
    inspect = ["graphopt", "inspect", "--config", str(config)]
    inspected = [measured(inspect) for _ in range(REPEATS)]

    parameters = random_checkpoint(work / "model")
    shards = len(list((work / "model").glob("*.safetensors")))
    idle = measured([sys.executable, "-P", "-c", IMPORTS.format(model="Qwen2ForCausalLM")])
    compiled: list[dict[str, Any]] = []
    for repeat in range(REPEATS):
        out = work / f"out{repeat}"
        command = ["graphopt", "compile", str(work / "model"), "--emit", "hf", "--passes", ""]
        compiled.append(measured([*command, "-o", str(out)]))
        shutil.rmtree(out)
    above = [c["peak_anonymous_bytes"] - idle["peak_anonymous_bytes"] for c in compiled]
    return {
        "command": "python tools/bench_scale.py",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "summary": {
            "inspect_70b_seconds": max(run["seconds"] for run in inspected),
            "inspect_70b_peak_bytes": max(run["peak_bytes"] for run in inspected),
            "compile_1_5b_parameters": parameters,
            "compile_1_5b_shards": shards,
            "compile_1_5b_seconds": max(run["seconds"] for run in compiled),
            "compile_1_5b_anonymous_bytes_above_imports": max(above),
        },
        "inspect_runs": inspected,
        "imports_run": idle,
        "compile_runs": compiled,
    }


if __name__ == "__main__":
    main()
