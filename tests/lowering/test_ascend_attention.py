"""The Ascend kernels: interpreted against fp64; compiled for a 910B and executed on this machine.

The kernels are interpreted by upstream Triton in a process of its own, whatever device is here.
Tests marked `ascend` need the virtual environment that `tools/check_ascend.py` makes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version
from sampling import exhaustive_but

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = str(REPOSITORY / "tests")

# Fields of the attention; then B, H, G, S, T, D, Dv; then BLOCK_M, BLOCK_N, BLOCK_KV.
CASES = {
    "causal": ({}, (1, 2, 1, 65, 65, 64, 64), (32, 16, 64)),
    "one query": ({}, (2, 2, 1, 1, 63, 64, 64), (16, 16, 32)),
    "one key": ({}, (1, 2, 1, 1, 1, 32, 32), (16, 16, 64)),
    "more keys": ({}, (1, 2, 1, 7, 127, 80, 48), (32, 16, 64)),
    "more queries": ({}, (1, 2, 2, 64, 40, 32, 32), (32, 32, 64)),
    "full": ({"causal": False}, (1, 2, 1, 33, 127, 32, 64), (32, 16, 32)),
    "top left": ({"align": "top-left"}, (1, 2, 1, 40, 64, 64, 64), (16, 32, 32)),
    "window": ({"window": 20}, (1, 2, 1, 65, 65, 32, 32), (32, 16, 16)),
    "window over rounds": ({"window": 80}, (1, 1, 1, 64, 160, 32, 32), (16, 16, 32)),
    "window, full, top left": (
        {"window": 9, "causal": False, "align": "top-left"}, (1, 2, 1, 65, 40, 32, 32),
        (32, 16, 32),
    ),
    "softcap": ({"softcap": 2.0}, (1, 2, 1, 40, 40, 96, 96), (32, 16, 64)),
    "key mask": ({"padding_mask": True}, (3, 2, 1, 33, 65, 32, 32), (32, 16, 32)),
    "sinks, lengths": ({"sinks": True, "kv_lens": True}, (2, 2, 1, 33, 63, 32, 32), (32, 16, 16)),
    "wide": ({}, (1, 1, 1, 17, 64, 256, 192), (32, 32, 32)),
    "everything": (
        {"window": 30, "softcap": 3.0, "padding_mask": True, "sinks": True, "kv_lens": True},
        (2, 4, 2, 40, 64, 64, 64), (32, 16, 64),
    ),
}  # fmt: skip


# Every pair of heads and keys, and each of both with one token and with several.
DECODES = {
    f"{group} heads a key head, {keys} keys, {tokens} tokens": (
        {}, (2, group, 1, tokens, keys, 32, 32), (16, 64, 128) if keys > 100 else (16, 16, 64),
    )
    for (i, group), (j, keys) in itertools.product(
        enumerate((1, 3, 4, 8)), enumerate((1, 63, 64, 65, 1000))
    )
    for tokens in [(1, 4)[(i + j) % 2]]
} | {
    "wide": ({}, (1, 4, 1, 4, 130, 192, 256), (16, 32, 64)),
    "tile larger than the step": ({}, (1, 4, 1, 3, 130, 80, 48), (64, 32, 32)),
    "full": ({"causal": False}, (1, 4, 1, 4, 130, 32, 64), (16, 32, 32)),
    "top left": ({"align": "top-left"}, (1, 4, 2, 4, 64, 64, 64), (16, 16, 32)),
    "window": ({"window": 100}, (1, 6, 2, 4, 300, 32, 32), (16, 16, 32)),
    "window, full, top left": (
        {"window": 9, "causal": False, "align": "top-left"}, (1, 4, 1, 4, 200, 32, 32),
        (16, 16, 32),
    ),
    "softcap": ({"softcap": 2.0}, (1, 8, 1, 1, 130, 96, 96), (16, 32, 64)),
    "sinks": ({"sinks": True}, (2, 6, 2, 4, 130, 32, 32), (16, 16, 16)),
    "key mask": ({"padding_mask": True}, (3, 8, 2, 4, 130, 32, 32), (16, 16, 32)),
    "kv_lens": ({"kv_lens": True}, (3, 8, 2, 1, 130, 32, 32), (16, 16, 16)),
    "everything": (
        {"window": 90, "softcap": 3.0, "padding_mask": True, "sinks": True, "kv_lens": True},
        (3, 6, 2, 4, 260, 64, 64), (16, 16, 32),
    ),
}  # fmt: skip


# Each number of heads, of keys and of tokens, and two that show whether keys were split at all.
OFTEN = (
    "1 heads a key head, 63 keys, 4 tokens", "3 heads a key head, 1 keys, 4 tokens",
    "4 heads a key head, 1000 keys, 1 tokens", "8 heads a key head, 64 keys, 4 tokens",
    "8 heads a key head, 65 keys, 1 tokens",
    *(name for name in DECODES if " heads a key head" not in name),
)  # fmt: skip


def interpret(decoded):
    """Run cases in this process and print the errors; what the fixture below starts.

    Args:
        decoded: Which of `DECODES`.
    """
    import torch
    from attention_reference import random_case
    from interpreted import leave_out_idle_work

    from graphopt.lowering.kernels.ascend_triton import ascend_constants
    from graphopt.plan import AttentionPlan, AttentionSpec
    from graphopt.plan.ascend import AscendPlanner
    from graphopt.runtime.ascend import decode, prefill
    from graphopt.runtime.attention import Extras, Keys
    from graphopt.runtime.kernels.ascend_decode import ascend_decode, ascend_merge
    from graphopt.runtime.kernels.ascend_prefill import ascend_prefill

    leave_out_idle_work()

    def constants_of(fields, sizes, blocks, phase):
        spec = AttentionSpec(
            head_dim=sizes[5], value_dim=sizes[6], heads=sizes[1], kv_heads=sizes[2], lse=True,
            phase=phase, **fields,
        )  # fmt: skip
        tiles = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_KV"), blocks, strict=True))
        tiles = AscendPlanner.complete(spec, {**tiles, "SPLITS": 8})
        return ascend_constants(
            AttentionPlan(spec, "ascend910b", "ascend-triton", tiles, (), "given")
        )

    def measure(case, out, lse):
        exact, bound = case.bound()
        _, expected = case.run(torch.float64)
        unseen = torch.isinf(expected)
        return {
            "error": (out.double() - exact).abs().max().item(),
            "bound": bound,
            "lse_error": (lse.double() - expected)[~unseen].abs().max().item(),
            "unseen_rows": int(unseen.sum()),
            "unseen_rows_agree": bool(torch.equal(torch.isinf(lse), unseen)),
            "unseen_rows_are_0": bool((out[unseen] == 0).all()),
            "finite": bool(torch.isfinite(out).all()),
        }

    prefills = {}
    for name, (fields, sizes, blocks) in CASES.items():
        case = random_case(sizes, fields, seed=3)
        runs = [
            prefill(
                ascend_prefill, case.q, Keys(case.k, case.v, kv_lens=case.kv_lens),
                constants_of(fields, sizes, blocks, "prefill"), scale=case.scale,
                extras=Extras(mask=case.mask, sinks=case.sinks), programs=programs,
            )
            # Results don't hang on how many programs share the tasks.
            for programs in ((1, 3) if name == "causal" else (3,))
        ]  # fmt: skip
        prefills[name] = measure(case, *runs[-1])
        prefills[name]["same"] = all(torch.equal(runs[-1][0], other) for other, _ in runs)

    decodes = {}
    for name in decoded:
        fields, sizes, blocks = DECODES[name]
        case = random_case(sizes, fields, seed=3)
        if name == "key mask":
            case.mask[0] = 0
        constants = constants_of(fields, sizes, blocks, "decode")

        def run(rows=slice(None), splits=None, programs=3, case=case, constants=constants):
            mask, lengths = (None if x is None else x[rows] for x in (case.mask, case.kv_lens))
            return decode(
                ascend_decode, ascend_merge, case.q[rows],
                Keys(case.k[rows], case.v[rows], kv_lens=lengths), constants, scale=case.scale,
                extras=Extras(mask=mask, sinks=case.sinks), splits=splits, programs=programs,
            )  # fmt: skip

        out, lse = run()
        whole, whole_lse = run(splits=1)
        again, again_lse = run(programs=2)
        alone, alone_lse = run(rows=slice(sizes[0] - 1, None))
        decodes[name] = {
            **measure(case, out, lse),
            "whole": measure(case, whole, whole_lse),
            "same": torch.equal(out, again) and torch.equal(lse, again_lse),
            "same_alone": torch.equal(out[-1:], alone) and torch.equal(lse[-1:], alone_lse),
            "split": not (torch.equal(lse, whole_lse) and torch.equal(out, whole)),
        }
    print(json.dumps({"prefill": prefills, "decode": decodes}))


@pytest.fixture(scope="module")
def interpreted(request):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    versions = {name: Version(importlib.metadata.version(name)) for name in ("triton", "numpy")}
    if versions["triton"] < Version("3.7") and versions["numpy"] >= Version("2.5"):
        pytest.skip("the interpreter of Triton 3.6 takes no index from an array of NumPy 2.5")
    every = any("exhaustive" in item.keywords for item in request.session.items)
    decoded = DECODES if every else OFTEN
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, json.dumps([*decoded])],
        capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "",
             "PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_exact(found):
    assert found["finite"]
    assert found["error"] <= found["bound"]
    assert found["lse_error"] <= 1e-4
    assert found["unseen_rows_agree"] and found["unseen_rows_are_0"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_interpreted_it_is_as_exact_as_it_may_be(interpreted, name):
    found = interpreted["prefill"][name]
    assert_exact(found)
    assert found["same"]


@pytest.mark.slow
@pytest.mark.parametrize("name", exhaustive_but(DECODES, *OFTEN))
def test_interpreted_decoding_is_as_exact_split_and_whole(interpreted, name):
    found = interpreted["decode"][name]
    assert_exact(found)
    assert_exact(found["whole"])
    assert found["same"] and found["same_alone"]


@pytest.mark.slow
def test_rows_that_see_nothing_and_spans_are_among_the_cases(interpreted):
    assert interpreted["prefill"]["more queries"]["unseen_rows"] > 0
    assert interpreted["prefill"]["window, full, top left"]["unseen_rows"] > 0
    decodes = interpreted["decode"]
    assert decodes["key mask"]["unseen_rows"] == 8 * 4
    assert decodes["3 heads a key head, 1 keys, 4 tokens"]["unseen_rows"] == 2 * 3 * 3
    # Another order of summation shows that keys were split at all.
    for name in ("4 heads a key head, 1000 keys, 1 tokens", "window", "kv_lens", "everything"):
        assert decodes[name]["split"], name


# --- With the compiler ---


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location(
        "check_ascend", REPOSITORY / "tools" / "check_ascend.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def venv(tool):
    folder = Path(os.environ.get("GRAPHOPT_ASCEND_VENV") or tool.default_venv())
    if not tool.is_ready(folder):
        pytest.skip(
            f"there is no triton-ascend in {folder}: run python tools/check_ascend.py once, or "
            "name its folder in GRAPHOPT_ASCEND_VENV"
        )
    return folder


@pytest.mark.ascend
@pytest.mark.slow
def test_the_compiler_agrees_with_the_planner(tool, venv, tmp_path):
    shapes = tool.draw_shapes(4, seed=5) + tool.draw_shapes(4, seed=5, phase="decode")
    rows = tool.compare(venv, shapes, tmp_path)
    assert all(row["agree"] for row in rows)
    for name in ("ub_error", "merge_ub_error"):
        assert all(abs(row.get(name, 0.0)) <= 0.2 for row in rows)


@pytest.mark.ascend
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_the_planner_chooses_compiles(tool, venv, tmp_path, head_dim, phase):
    from graphopt.lowering.kernels import plan_attention
    from graphopt.plan import AttentionSpec
    from graphopt.targets import get_target

    fields = {
        "head_dim": head_dim, "heads": 8, "kv_heads": 2, "window": 1024, "padding_mask": True,
        "phase": phase,
    }  # fmt: skip
    tiles = plan_attention(AttentionSpec(**fields), get_target("ascend910b")).tiles
    shapes = [{"fields": fields, "tiles": tiles}]
    if phase == "decode":
        # The tile of a step of one token.
        shapes.append({"fields": fields, "tiles": {**tiles, "BLOCK_M": 16}})
    for row in tool.compare(venv, shapes, tmp_path):
        assert row["compiler_fits"] and row["planner_fits"]


@pytest.mark.ascend
@pytest.mark.slow
def test_the_compiled_form_executed_here_is_exact(tool, venv, tmp_path):
    try:
        tool.native_tools()
    except tool.Missing as missing:
        pytest.skip(str(missing))
    runs = [run for run in tool.RUNS if {"sinks", "phase"} & set(run[0])]
    for row in tool.execute(venv, runs[-3:], tmp_path):
        assert row["max_error"] <= row["bound"]
        assert row["max_relative_error"] <= 1e-3
        assert row["lse_error"] <= 1e-4 and row["unseen_rows_agree"]


def test_a_missing_tool_is_said_with_what_to_install(tool, tmp_path, monkeypatch):
    with pytest.raises(tool.Missing, match="remove that folder and run this again"):
        tool.compiler(tmp_path, "bishengir-compile")
    monkeypatch.setattr(tool, "LLVM", str(tmp_path))
    with pytest.raises(tool.Missing, match="apt-get install mlir-19-tools llvm-19"):
        tool.native_tools()
    monkeypatch.setattr(tool.platform, "machine", lambda: "riscv64")
    with pytest.raises(tool.Missing, match="no build for linux on riscv64"):
        tool.prepare(tmp_path)


def test_the_shapes_are_drawn_the_same_again(tool):
    for phase in ("prefill", "decode"):
        drawn = tool.draw_shapes(5, phase=phase)
        assert drawn == tool.draw_shapes(5, phase=phase)
        assert drawn != tool.draw_shapes(5, seed=tool.SEED + 1, phase=phase)


if __name__ == "__main__":
    interpret(json.loads(sys.argv[1]))
