"""Drawn attentions by every kernel that runs here; on a GPU through the tool, and some by name."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from attention_sweep import KERNELS, Drawn, draw, number, problem
from attention_verdict import judge, run

from graphopt.errors import LoweringError
from graphopt.runtime.nvrtc import nvrtc_version

TOOL = Path(__file__).parents[1] / "tools" / "sweep_attention.py"
INTERPRETED = (("hopper", "triton"), ("ampere", "triton"), ("ascend910b", "ascend-triton"))
FEATURES = ("padding_mask", "bias", "alibi", "sinks", "varlen", "kv_lens", "lse", "selected_blocks",
            "page_max")  # fmt: skip
REFUSED = {
    "hopper-cuda": {"padding_mask", "bias", "alibi", "selected_blocks", "page_max"},
    "volta-cuda": {"selected_blocks", "page_max"},
    "ascend-triton": {"bias", "alibi", "selected_blocks", "page_max", "varlen"},
}
# Head sizes that 16 does not divide, and tiles that needed more memory than was planned:
# D, H, G, S, T, B, dtype, fields.
FOUND = [
    (72, 2, 1, 1500, 1500, 2, "bf16", {}),
    (40, 28, 4, 1500, 2500, 2, "bf16", {"softcap": 20.0}),
    (72, 4, 2, 333, 844, 1, "bf16", {"sinks": True}),
    (72, 6, 2, 1023, 2023, 2, "bf16", {"causal": False, "softcap": 20.0, "alibi": True}),
    (72, 32, 4, 333, 333, 2, "f16", {"window": 300, "sinks": True}),
    (192, 7, 1, 1500, 2011, 1, "f16", {"causal": False, "softcap": 20.0, "alibi": True}),
    (80, 8, 2, 1000, 1000, 2, "bf16", {}),
    (112, 33, 3, 20, 2, 4, "f16", {"causal": False, "chunk": 145, "bias": True}),
]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tool runs them all")
@pytest.mark.parametrize("index", range(9))
def test_drawn_attentions_interpreted(index: int) -> None:
    row = run(number(14, index, INTERPRETED))
    if row["verdict"] == "not run":
        pytest.skip(row["why"])
    assert row["verdict"] == "right", row


@pytest.mark.parametrize("kind", KERNELS)
def test_a_description_hangs_on_its_seed_and_its_number(kind: tuple[str, str]) -> None:
    drawn = [number(1, index, [kind]) for index in range(4)]
    assert drawn == [number(1, index, [kind]) for index in range(4)]
    assert len({str(each) for each in drawn}) == 4
    assert Drawn(**json.loads(json.dumps(drawn[0].__dict__))) == drawn[0]
    assert drawn != [number(2, index, [kind]) for index in range(4)]


def test_a_wrong_result_is_told_from_a_right_one() -> None:
    """One key too few, one head for another, a row left out, a log-sum-exp that is off."""
    fields = {"head_dim": 32, "value_dim": 32, "heads": 4, "kv_heads": 2, "dtype": "f16",
              "phase": "prefill", "causal": True, "lse": True}  # fmt: skip
    posed = problem(Drawn("ampere", "triton", fields, 2, 40, 40, 5), "cpu")
    right, lse = (
        torch.cat(results) for results in zip(*(part[0].run(torch.float64) for part in posed.parts),
                                              strict=True)
    )  # fmt: skip
    out = right.half()
    assert judge(posed.parts, out, lse).right
    for spoilt in (out.roll(1, 1), out.roll(1, 2), out.masked_fill(out > 2.0, float("nan"))):
        assert not judge(posed.parts, spoilt, lse).right
    assert not judge(posed.parts, out, lse + 1e-3).right
    one = out.clone()
    one[1, 3, 17] = 0.0
    assert not judge(posed.parts, one, lse).right
    for case, *_ in posed.parts:
        case.mask = torch.ones(1, 40)
        case.mask[0, 7] = 0.0
    assert not judge(posed.parts, out, lse).right


def test_draws_reach_all_that_is_promised() -> None:
    rng = random.Random(0)
    for kind in KERNELS:
        drawn = [draw(rng, *kind) for _ in range(500)]
        specs = [each.spec() for each in drawn]
        assert len({spec.head_dim for spec in specs}) == (15 if kind[1] == "hopper-cuda" else 29)
        assert {spec.group for spec in specs} == set(range(1, 17))
        assert {each.batch for each in drawn} == set(range(1, 6))
        assert max(each.keys for each in drawn) > 2000
        assert min(each.keys for each in drawn) == 1
        refused = REFUSED.get(kind[1], set())
        for name in FEATURES:
            met = any(getattr(spec, name) for spec in specs)
            assert met != (name in refused), (kind, name)


@pytest.mark.parametrize("width, heads, groups, queries, keys, batch, dtype, fields", FOUND)
@pytest.mark.parametrize("target", ["hopper", "ampere"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_attentions_that_once_were_wrong(
    target: str, width: int, heads: int, groups: int, queries: int, keys: int, batch: int,
    dtype: str, fields: dict[str, object],
) -> None:  # fmt: skip
    whole = {"head_dim": width, "heads": heads, "kv_heads": groups, "dtype": dtype,
             "lse": True, **fields}  # fmt: skip
    row = run(Drawn(target, "triton", whole, batch, queries, keys, seed=0))
    assert row["verdict"] == "right", row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("kind", [kind for kind in KERNELS if kind[1] != "ascend-triton"])
def test_a_sample_of_the_sweep(kind: tuple[str, str]) -> None:
    """In processes of its own: what one of them does to the GPU ends no other test."""
    if kind[1] == "volta-cuda":
        try:
            nvrtc_version(12)
        except LoweringError as error:
            pytest.skip(str(error))
    command = [sys.executable, str(TOOL), "--seed", "14", "--count", "8", "--processes", "2"]
    command += ["--target", kind[0], "--kernel", kind[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
