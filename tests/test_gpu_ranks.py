"""Packages for two ranks on two GPUs: NCCL, recorded steps, and tokens that are equal on both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from emitted import load_file
from families import captured, cases
from ranks import run_program_on_gpu, run_ranks
from sharded import VOCAB, sharded, sharded_tiny

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.execute.interpreter import Runner
from graphopt.ir import Program

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"two GPUs are needed, of {torch.cuda.device_count()}"
    ),
]
FEATURES: list[dict[str, Any]] = [{}, {"bias": True, "window": 5, "sinks": True}]
PROMPT = list(range(3, 40))

RANK = """
import json, os, sys, time
from pathlib import Path
import torch

sys.path.insert(0, sys.argv[1])
from model import Decoder, generate, load, ranks

model = load(sys.argv[1], device="cuda")
mine = ranks.joined()
prompt = json.loads(sys.argv[2])
decoder = Decoder(model, 64)
tokens = [decoder.start(prompt)]
logits = [decoder.logits.float().tolist()]
while len(tokens) < 12:
    tokens.append(decoder.step())
    logits.append(decoder.logits.float().tolist())
if len(sys.argv) > 3:
    Path(sys.argv[3]).with_suffix(f".{mine.rank}").write_text(str(os.getpid()))
    while True:  # until it is ended, in recorded steps
        decoder.start(prompt)
        for _ in range(20):
            decoder.step()
found = {
    "tokens": tokens, "logits": logits, "graphs": len(decoder.graphs), "device": str(mine.device),
    "backend": torch.distributed.get_backend(mine.group), "generated": generate(model, prompt, 12),
}
Path(f"{sys.argv[1]}.{mine.rank}.json").write_text(json.dumps(found))
"""


def started(folder: Path, *more: str) -> subprocess.Popen[str]:
    script = folder.parent / "rank.py"
    script.write_text(RANK)
    return subprocess.Popen(
        [
            sys.executable, "-P", "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node=2", str(script), str(folder), json.dumps(PROMPT), *more,
        ],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def programs(features: dict[str, Any]) -> tuple[Program, Program]:
    from programs import tiny_program

    one = tiny_program(cache=True, vocab=VOCAB, head_dim=32, **features)
    return one, sharded(one)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("target", ["ampere", "hopper"])
def test_two_gpus_decode_the_same_by_recorded_steps(
    target: str, features: dict[str, Any], tmp_path: Path
) -> None:
    one, two = programs(features)
    go.emit(one, tmp_path / "one", target=target, emit=("torch",))
    go.emit(two, tmp_path / "two", target=target, emit=("torch",))
    process = started(tmp_path / "two")
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    found = [json.loads((tmp_path / f"two.{rank}.json").read_text()) for rank in range(2)]
    assert [row["device"] for row in found] == ["cuda:0", "cuda:1"]
    assert all(row["backend"] == "nccl" and row["graphs"] == 1 for row in found)
    assert found[0]["tokens"] == found[1]["tokens"] == found[0]["generated"]
    assert found[0]["logits"] == found[1]["logits"]
    alone = load_file(tmp_path / "one" / "model.py")
    decoder = alone.Decoder(alone.load(tmp_path / "one"), 64)
    decoder.start(PROMPT)
    wanted = [decoder.logits.float().cpu()]
    for token in found[0]["tokens"][:-1]:
        decoder.step(token)
        wanted.append(decoder.logits.float().cpu())
    expected, logits = torch.stack(wanted), torch.tensor(found[0]["logits"])
    # bf16 rounds to 4e-3, a few dozen times over on the way through.
    assert float((logits - expected).abs().max()) < 5e-2 * float(expected.abs().max())


def test_graphopt_runs_two_gpus(tmp_path: Path) -> None:
    go.emit(sharded_tiny(), tmp_path / "out", emit=("torch",))
    on_gpus = open_language_model(str(tmp_path / "out"), device="cuda")
    on_cpu = open_language_model(str(tmp_path / "out"), device="cpu")
    assert "2 ranks on cuda" in on_gpus.placement
    ids = torch.tensor([PROMPT])
    expected = on_cpu.logits(ids)
    assert float((on_gpus.logits(ids) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_a_killed_rank_ends_the_other_in_the_middle_of_recorded_steps(tmp_path: Path) -> None:
    _, two = programs({})
    go.emit(two, tmp_path / "two", target="ampere", emit=("torch",))
    process = started(tmp_path / "two", str(tmp_path / "pid"))
    files = [tmp_path / f"pid.{rank}" for rank in range(2)]
    limit = time.monotonic() + 240
    while not all(file.exists() for file in files) and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.1)
    time.sleep(2)
    os.kill(int(files[1].read_text()), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank 0 ends: rank 1 has ended without a word" in said


@pytest.mark.parametrize("family", ["llama", "falcon", "olmo2", "gpt_oss", "deepseek_v3"])
def test_programs_of_two_gpus_compute_what_simulated_ranks_do(family: str) -> None:
    recipe = go.Pipeline.parse("shard{tp=2}").within_default()
    program, _ = recipe.run(captured(family)[1], go.RunOptions(verify=False))
    case = cases((7,))[2]
    expected = Runner(program, dtype=torch.float64).logits(case.inputs)
    found = run_ranks(run_program_on_gpu, program, case.inputs, group=False, limit=120)
    assert torch.equal(*found)
    real = case.attention_mask.bool()
    difference = (found[0] - expected)[real].abs().max()
    assert float(difference) < 1e-12 * float(expected[real].abs().max())
