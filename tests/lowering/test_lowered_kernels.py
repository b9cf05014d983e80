"""Models emitted for GPUs: what lies in the folder, and what they do where there is no GPU."""

from __future__ import annotations

import ast
import importlib.util
import warnings

import pytest
import torch
from command_line import runner
from programs import tiny_program

import graphopt as go
from graphopt.cli.commands import app
from graphopt.errors import LoweringError
from graphopt.execute.interpreter import Runner
from graphopt.ir import Array, Weight
from graphopt.lowering.kernels.plan_kernels import compute_dtype
from graphopt.lowering.torch import source_files
from graphopt.lowering.torch.lowered_kernels import lower_attentions, range_report
from graphopt.targets import all_targets, get_target

GPUS = tuple(target.name for target in all_targets().values() if target.kernels)
# What the source of a family that is compiled ahead multiplies by.
PRODUCTS = {"hopper-cuda": "wgmma.mma_async", "volta-cuda": "mma.sync.aligned.m8n8k4"}


def program(**features):
    return tiny_program(**{"cache": True, "head_dim": 32, **features})


def module_of(folder):
    spec = importlib.util.spec_from_file_location("emitted", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("target", GPUS)
def test_sources_are_python_with_their_plans_and_the_same_each_time(target):
    files = source_files(program(window=5), target)
    assert files == source_files(program(window=5), target)
    assert {"model.py", "kernels/__init__.py", "kernels/dispatch.py"} <= set(files)
    families = get_target(target).kernels
    assert ("kernels/prefill.py" in files) == ("triton" in families)
    for name, text in files.items():
        if name.endswith(".py"):
            ast.parse(text)
            assert "graphopt.runtime" not in text.replace("`graphopt.runtime", "")
    plans = lower_attentions(program(window=5), target).plans
    assert plans and all(line in files["kernels/__init__.py"] for p in plans for line in p.lines())
    if "triton" in families:
        # The kernels say which plans they serve, and have lost what those never use.
        for phase in ("prefill", "decode"):
            head, text = files[f"kernels/{phase}.py"].split('"""', 1)
            assert all(
                plan.spec.describe() in head
                for plan in plans
                if plan.spec.phase == phase and plan.kernel == "triton"
            )
            assert "window=5" in head and "SOFTCAP=0.0" in head and "SOFTCAP" not in text
        assert "WINDOW" in files["kernels/common.py"]
    cuda = [text for name, text in files.items() if name.endswith(".cu")]
    products = [PRODUCTS[name] for name in families if name in PRODUCTS]
    assert bool(cuda) == bool(products)
    for text in cuda:
        assert text.startswith("// attention  ") and "D=32" in text.partition("\n")[0]
        assert any(product in text for product in products)


def test_a_cpu_has_no_kernels():
    assert lower_attentions(program(), "cpu") is None
    assert list(source_files(program(), "cpu")) == [
        "model.py",
        *(f"arena/{name}.py" for name in ("__init__", "arena", "arena_offsets", "out_forms")),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "features"),
    [
        # CUDA takes seconds to compile for every plan of a model.
        *(
            pytest.param(target, {}, marks=[pytest.mark.slow] * (target == "volta"))
            for target in GPUS
        ),
        ("ampere", {"alibi": True}),
        pytest.param("hopper", {"window": 5, "softcap": 2.0}, marks=pytest.mark.exhaustive),
        pytest.param("volta", {"window": 5, "alibi": True}, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs where there is no GPU")
def test_without_a_gpu_the_reference_runs_and_says_so(target, features, tmp_path):
    made = program(**features)
    go.emit(made, tmp_path / "out", target=target, emit=("torch",), dtype="float32")
    module = module_of(tmp_path / "out")
    model = module.load(tmp_path / "out")
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = Runner(made, dtype=torch.float64, mode="reference").logits({"input_ids": ids})
    with pytest.warns(UserWarning, match="attention on a CPU runs by its reference"):
        logits, _ = model(ids)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        decoder = module.Decoder(model, 20)
        tokens = [decoder.start([1, 2, 3])]
        tokens += [decoder.step() for _ in range(4)]
        assert tokens == module.generate(model, [1, 2, 3], 5)
    whole = expected_tokens(made, [1, 2, 3], 5)
    assert tokens == whole


def expected_tokens(made, ids, count):
    runner, tokens = Runner(made, dtype=torch.float64, mode="reference"), []
    for _ in range(count):
        logits = runner.logits({"input_ids": torch.tensor([[*ids, *tokens]])})
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs where there is no GPU")
def test_a_full_cache_and_an_empty_prompt_are_refused(tmp_path):
    go.emit(program(), tmp_path / "out", target="ampere", emit=("torch",))
    module = module_of(tmp_path / "out")
    decoder = module.Decoder(module.load(tmp_path / "out"), 5)
    for ids in ([], [1] * 5):
        with pytest.raises(ValueError, match=f"a prompt of {len(ids)} tokens in a cache of 5"):
            decoder.start(ids)
    decoder.start([1, 2, 3, 4])
    decoder.step()
    with pytest.raises(ValueError, match="the cache of 5 tokens is full"):
        decoder.step()


def test_what_no_kernel_takes_runs_by_its_reference_and_is_noted(tmp_path):
    report = go.emit(tiny_program(cache=True), tmp_path / "out", target="ampere", emit=("torch",))
    notes = [note.reason for note in report.artifact.notes]
    assert any("head_dim is 8: only multiples of 8 from 32" in note for note in notes)


def test_dtype_and_range():
    made = program()
    assert compute_dtype(made, get_target("ampere")) == "f16"
    made.checkpoint_dtype = torch.bfloat16
    assert compute_dtype(made, get_target("hopper")) == "bf16"
    assert compute_dtype(made, get_target("volta")) == "f16"
    ((where, what),) = range_report(made, "f16")
    assert where == "weights" and "computed in f16: the largest is" in what
    assert range_report(made, "bf16") == []
    name = next(weight.name for weight in made.weights if not weight.constant)
    far = made.weights[name].load().clone()
    far.view(-1)[3] = 7e4
    made.weights.replace(Weight(name, Array(far), made.weights[name].checkpoint))
    with pytest.raises(LoweringError, match=rf"{name} holds 70000, and f16 ends at 65504"):
        range_report(made, "f16")


@pytest.mark.slow
def test_changed_kernels_are_not_run(tmp_path):
    from graphopt.backends.opening import open_language_model

    go.emit(program(), tmp_path / "out", target="ampere", emit=("torch",))
    path = tmp_path / "out" / "kernels" / "dispatch.py"
    path.write_text(path.read_text() + "\n")
    shown = runner().invoke(app, ["eval", str(tmp_path / "out"), "--text", str(path)])
    assert shown.exit_code == 1 and "is not the file that graphopt writes" in shown.stderr
    with pytest.raises(Exception, match="is not the file that graphopt writes"):
        open_language_model(str(tmp_path / "out"))


def test_strict_refuses_what_runs_without_a_kernel(tmp_path):
    with pytest.raises(LoweringError, match=r"head_dim is 8.*Leave --strict out"):
        go.emit(tiny_program(cache=True), tmp_path / "out", target="ampere", strict=True)
    assert not (tmp_path / "out").exists()
    report = go.emit(program(), tmp_path / "out", target="ampere", strict=True)
    assert report.artifact.emit == ["torch"]


@pytest.mark.slow
def test_without_a_compiler_the_sources_are_there_and_triton_takes_over(tmp_path, monkeypatch):
    from graphopt.runtime import nvrtc as compiler

    def none(at_most):
        raise LoweringError("NVRTC, the CUDA compiler, is not installed.", "Install it.")

    monkeypatch.setattr(compiler, "_library", none)
    report = go.emit(program(), tmp_path / "out", target="hopper")
    assert any("NVRTC" in note.reason for note in report.artifact.notes)
    kernels = {path.suffix for path in (tmp_path / "out" / "kernels").iterdir()}
    assert kernels == {".cu", ".py"}
    form = next(plan.spec for plan in lower_attentions(program(), "hopper").plans)
    same = [
        plan.kernel for plan in lower_attentions(program(), "hopper").plans if plan.spec == form
    ]
    assert same == ["hopper-cuda", "triton"]
    with pytest.raises(LoweringError, match="NVRTC"):
        go.emit(program(), tmp_path / "other", target="hopper", strict=True)
