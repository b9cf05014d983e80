"""Packages for two ranks on two GPUs: NCCL, recorded steps, and tokens that are equal on both."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from emitted import load_file
from families import captured, cases
from programs import tiny_program
from ranks import run_programs_on_gpu, run_ranks
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

STEPS = 12
# Decodes in recorded steps until it is ended.
ENDLESS = """
import json, os, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from model import Decoder, load, ranks

model = load(sys.argv[1], device="cuda")
decoder = Decoder(model, 64)
while True:
    decoder.start(json.loads(sys.argv[2]))
    for _ in range(20):
        decoder.step()
    Path(sys.argv[3]).with_suffix(f".{ranks.joined().rank}").write_text(str(os.getpid()))
"""


def programs(features: dict[str, Any]) -> tuple[Program, Program]:
    one = tiny_program(cache=True, vocab=VOCAB, head_dim=32, **features)
    return one, sharded(one)


def decoded(decoder: Any, tokens: list[int] | None = None) -> tuple[list[int], torch.Tensor]:
    """Return tokens behind the prompt, by default a decoder's own, and its logits for each."""
    found, logits = [decoder.start(PROMPT)], [decoder.logits.float().cpu()]
    while len(found) < STEPS:
        found.append(decoder.step(tokens[len(found) - 1] if tokens else None))
        logits.append(decoder.logits.float().cpu())
    return found, torch.stack(logits)


def decoded_by_ranks(rank: int, folders: list[Path]) -> list[dict[str, Any]]:
    """Return what a rank makes of the prompt by each of some packages."""
    results, joined = [], []
    for folder in folders:
        module = load_file(folder / "model.py")
        model = module.load(folder, device="cuda")
        joined.append(module.ranks.joined())
        decoder = module.Decoder(model, 64)
        tokens, logits = decoded(decoder)
        results.append({
            "tokens": tokens, "logits": logits, "graphs": len(decoder.graphs),
            "device": str(joined[-1].device), "backend": dist.get_backend(joined[-1].group),
            "generated": module.generate(model, PROMPT, STEPS),
        })  # fmt: skip
    for mine in reversed(joined):
        mine.leave()
    return results


def test_two_gpus_decode_the_same_by_recorded_steps(tmp_path: Path) -> None:
    """By every target and every set of features, in one pair of processes."""
    folders = []
    for number, features in enumerate(FEATURES):
        one, two = programs(features)
        for target in ("ampere", "hopper"):
            folder = tmp_path / f"{target}{number}"
            go.emit(one, folder / "one", target=target, emit=("torch",))
            go.emit(two, folder / "two", target=target, emit=("torch",))
            folders.append(folder)
    split = [folder / "two" for folder in folders]
    with ThreadPoolExecutor(1) as beside:
        ranks = beside.submit(run_ranks, decoded_by_ranks, split, group=False, limit=150)
        # Compiled here while the ranks compile theirs.
        alone = [load_file(folder / "one" / "model.py") for folder in folders]
        decoders = [
            module.Decoder(module.load(folder / "one"), 64)
            for module, folder in zip(alone, folders, strict=True)
        ]
        for decoder in decoders:
            decoded(decoder)
    for number, (folder, decoder) in enumerate(zip(folders, decoders, strict=True)):
        found = [results[number] for results in ranks.result()]
        assert [row["device"] for row in found] == ["cuda:0", "cuda:1"], folder.name
        assert all(row["backend"] == "nccl" and row["graphs"] == 1 for row in found), folder.name
        tokens = found[0]["tokens"]
        assert tokens == found[1]["tokens"] == found[0]["generated"], folder.name
        assert torch.equal(found[0]["logits"], found[1]["logits"]), folder.name
        _, expected = decoded(decoder, tokens)
        # bf16 rounds to 4e-3, a few dozen times over on the way through.
        error = float((found[0]["logits"] - expected).abs().max())
        assert error < 5e-2 * float(expected.abs().max()), folder.name


LENGTHS = ((1, 768), (1, 641), (2, 512))
"""Texts and their tokens: rows that halve, that do not, and those of two."""


def by_rows(rank: int, folder: Path) -> dict[str, Any]:
    """Return the logits of a package by rows and with attention as a whole, and what was asked."""
    module = load_file(folder / "model.py")
    model = module.load(folder, device="cuda")
    mine = module.ranks.joined()
    sums, planned = module.kernels._SUMS, module.attention_linear_all_reduce
    asked: list[tuple[int, ...] | None] = []
    alike: list[bool] = []

    def noted(attention: Any, weight: torch.Tensor) -> torch.Tensor:
        """As planned; and are rows of the attention, from within tiles, those of the whole?"""
        count = attention.q.shape[0] * attention.q.shape[2]
        if attention.q.shape[2] > 1:
            whole = attention.whole().flatten(0, 1)
            pieces = [slice(0, 130), slice(130, count // 2), slice(count // 2, count)]
            alike.append(all(torch.equal(attention.rows(at), whole[at]) for at in pieces))
        made = planned(attention, weight)
        asked.append(sums._attention_plans.get((attention.described, *weight.shape)))
        return made

    def whole(attention: Any, weight: torch.Tensor) -> torch.Tensor:
        return sums.linear_all_reduce(attention.whole(), weight)

    # Figures by which chunks hide what is sent, however few the heads are.
    sums._figures = dataclasses.replace(
        sums._figures.recorded(), cores=1, tiles=(), one_shot_bytes=1, link=1e8, library=1e8,
        copy_engine=1e9, copy_start=0.0, signal=0.0, launch=0.0, attention_flops=1e9,
        least_gain=0.0,
    )  # fmt: skip
    found: dict[str, Any] = {"logits": {}}
    for name, way in (("rows", noted), ("whole", whole)):
        module.attention_linear_all_reduce = way
        for texts, tokens in LENGTHS:
            generator = torch.Generator().manual_seed(tokens)
            ids = torch.randint(0, VOCAB, (texts, tokens), generator=generator)
            decoder = module.Decoder(model, tokens + 8, texts)
            decoder.start(ids.tolist() if texts > 1 else ids[0].tolist())
            logits = [decoder.logits.float().cpu()]
            for _ in range(3):
                decoder.step([1] * texts if texts > 1 else 1)
                logits.append(decoder.logits.float().cpu())
            found["logits"][name, texts, tokens] = torch.stack(logits)
    mine.leave()
    return found | {"chunks": asked, "alike": alike}


@pytest.mark.parametrize("heads", [16, 4], ids=["grouped", "as many key heads"])
def test_attention_by_rows_on_two_gpus(heads: int, tmp_path: Path) -> None:
    """The kernels' rows are those of the whole to the bit, and sums are right but for rounding."""
    program = tiny_program(
        cache=True, vocab=VOCAB, hidden=256, heads=heads, kv_heads=4, head_dim=64, ffn=256
    )  # fmt: skip
    go.emit(sharded(program), tmp_path / "two", target="hopper", emit=("torch",))
    found = run_ranks(by_rows, tmp_path / "two", group=False, limit=150)
    for result in found:
        assert result["alike"] and all(result["alike"])
        # Of two layers: every prompt in chunks, and no token alone.
        chunks = [cut for cut in result["chunks"] if cut is not None]
        assert len(chunks) == 2 * len(LENGTHS) and len(result["chunks"]) > len(chunks)
        for texts, tokens in LENGTHS:
            rows, whole = (result["logits"][name, texts, tokens] for name in ("rows", "whole"))
            assert torch.equal(rows, found[0]["logits"]["rows", texts, tokens])
            # bf16 rounds to 4e-3, a few dozen times over on the way through.
            assert float((rows - whole).abs().max()) < 5e-2 * float(whole.abs().max())


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
    (tmp_path / "rank.py").write_text(ENDLESS)
    process = subprocess.Popen(
        [
            sys.executable, "-P", "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node=2", str(tmp_path / "rank.py"), str(tmp_path / "two"),
            json.dumps(PROMPT), str(tmp_path / "pid"),
        ],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    files = [tmp_path / f"pid.{rank}" for rank in range(2)]
    limit = time.monotonic() + 240
    while not all(file.exists() for file in files) and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.1)
    # Behind the first recorded steps of both.
    time.sleep(0.5)
    os.kill(int(files[1].read_text()), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank 0 ends: rank 1 has ended without a word" in said


def test_programs_of_two_gpus_compute_what_simulated_ranks_do() -> None:
    """Several families, in one pair of processes."""
    recipe = go.Pipeline.parse("shard{tp=2}").within_default()
    case = cases((7,))[2]
    real = case.attention_mask.bool()
    made = {
        family: recipe.run(captured(family)[1], go.RunOptions(verify=False))[0]
        for family in ("llama", "falcon", "olmo2", "gpt_oss", "deepseek_v3")
    }
    found = run_ranks(
        run_programs_on_gpu, [*made.values()], case.inputs, group=False, limit=120
    )  # fmt: skip
    for number, (family, program) in enumerate(made.items()):
        expected = Runner(program, dtype=torch.float64).logits(case.inputs)
        first, other = (results[number] for results in found)
        assert torch.equal(first, other), family
        difference = (first - expected)[real].abs().max()
        assert float(difference) < 1e-12 * float(expected[real].abs().max()), family
