"""Models emitted for GPUs whose KV states are rings and pages, and what attention gives beside.

Their kernels run here as they were emitted: interpreted, or by the emulation of Volta.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from typing import Any

import pytest
import torch
from attention_programs import GENERAL, LAYOUTS, SIZES, errors, gating
from emitted import load_file
from programs import tiny_program
from sampling import exhaustive_but
from volta_emulator import COMPILER, emulated

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.generate import generate_ids
from graphopt.ir import B, Program, S, Type
from graphopt.ir.graph import In
from graphopt.ir.relayout import with_layouts
from graphopt.lowering.torch.lowered_kernels import LoweredKernels

if torch.cuda.is_available():
    pytest.skip("tests/test_gpu.py runs them on the device", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings(
    "ignore:attention on a CPU", "ignore:no kernel was planned", "ignore:pages of"
)


@pytest.fixture(autouse=True)
def nothing_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here runs machine code, which takes a while to make."""
    monkeypatch.setattr(LoweredKernels, "compile", lambda self: {})


def emitted(program: Program, folder: Any, target: str, dtype: torch.dtype) -> tuple[Any, Any]:
    # The reference is compared in fp32, in which weights are stored for that.
    stored = "float32" if dtype == torch.float32 else "auto"
    go.emit(program, folder / "out", target=target, emit=("torch",), dtype=stored)
    module = load_file(folder / "out" / "model.py")
    return module, module.load(folder / "out", dtype=dtype)


@pytest.mark.parametrize(
    ("layouts", "target"),
    [*((name, "ascend910b") for name in LAYOUTS), ("ring and pages", "volta")],
)
def test_the_reference_reads_every_layout(layouts: str, target: str, tmp_path: Any) -> None:
    program = with_layouts(tiny_program(**SIZES), LAYOUTS[layouts])
    module, model = emitted(program, tmp_path, target, torch.float32)
    assert errors(program, module, model, steps=6) < 1e-5


def interpreted(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let an emitted model's Triton kernels run on the CPU; return the constants of those run."""
    dispatcher, ran = type(module.kernels.DISPATCHER), []
    load = dispatcher._load

    def noted(self: Any, plan: Any) -> Any:
        ran.append({**plan.constants, "phase": plan.key.phase})
        return load(self, plan)

    monkeypatch.setattr(dispatcher, "_on_device", staticmethod(lambda q: True))
    monkeypatch.setattr(dispatcher, "_runs_here", lambda self: True)
    monkeypatch.setattr(dispatcher, "_code", lambda self, image: None)
    monkeypatch.setattr(dispatcher, "_load", noted)
    return ran


HALF = 24 * 2.0**-11
"""Two dozen roundings to f16 on the way through, most of them averaged out."""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(
    "layouts", [pytest.param("ring of the window", marks=pytest.mark.slow), "ring and pages"]
)
def test_interpreted_kernels_read_every_layout(
    layouts: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = with_layouts(tiny_program(**SIZES), LAYOUTS[layouts])
    module, model = emitted(program, tmp_path, "ampere", torch.float16)
    ran = interpreted(module, monkeypatch)
    assert errors(program, module, model, steps=2) < HALF
    found = {(row["phase"], row["RING"], row["PAGE"]) for row in ran}
    ring, page = (LAYOUTS[layouts][name].size for name in ("kv.0", "kv.1"))
    assert {("decode", ring, 0), ("decode", 0, page), ("prefill", 0, 0), ("prefill", 0, page)} <= (
        found
    )


@pytest.mark.parametrize("name", GENERAL)
def test_the_reference_computes_what_is_asked_for(name: str, tmp_path: Any) -> None:
    program = GENERAL[name]()
    module, model = emitted(program, tmp_path, "ascend910b", torch.float32)
    assert errors(program, module, model, steps=6) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(
    "name",
    exhaustive_but(GENERAL, "log-sum-exp, ring", "selected pages and their maxima"),
)  # fmt: skip
def test_interpreted_kernels_compute_what_is_asked_for(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = GENERAL[name]()
    module, model = emitted(program, tmp_path, "ampere", torch.float16)
    ran = interpreted(module, monkeypatch)
    assert errors(program, module, model, steps=1) < HALF
    for phase in ("prefill", "decode"):
        rows = [row for row in ran if row["phase"] == phase]
        switches = [
            {key: bool(row[key]) for key in ("LSE", "PAGE_MAX", "SELECTED")} for row in rows
        ]
        assert switches and all(
            row == {
                "LSE": "log-sum-exp" in name or "their" in name,
                "PAGE_MAX": "maxima" in name, "SELECTED": "selected" in name,
            }
            for row in switches
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("ring", [True, False])
def test_emulated_kernels_of_volta_read_rings_and_pages(
    ring: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ring's also give their log-sum-exp."""
    layout = {"kv.0": LAYOUTS["ring and pages"]["kv.0" if ring else "kv.1"]}
    program = with_layouts(tiny_program(**SIZES, layers=1), layout)
    program = gating(program, None) if ring else program
    module, model = emitted(program, tmp_path, "volta", torch.float16)
    kernels, ran = module.kernels, []
    launcher = importlib.import_module(f"{kernels.__name__}.attention")

    def load(self: Any, plan: Any) -> Any:
        found, phase = emulated(plan.constants), plan.key.phase
        ran.append((phase, plan.constants["RING"], plan.constants["PAGE"], plan.constants["LSE"]))
        found = found if isinstance(found, tuple) else (found,)
        return functools.partial(getattr(launcher, phase), *found, constants=plan.constants)

    dispatcher = type(kernels.DISPATCHER)
    monkeypatch.setattr(dispatcher, "_on_device", staticmethod(lambda q: True))
    monkeypatch.setattr(dispatcher, "_code", lambda self, image: image)
    monkeypatch.setattr(dispatcher, "_load", load)
    assert errors(program, module, model, steps=2, grows=False) < HALF
    if ring:
        assert set(ran) == {("prefill", 0, 0, True), ("decode", 8, 0, True)}
    else:
        assert set(ran) == {("prefill", 0, 16, False), ("decode", 0, 16, False)}


def test_an_artifact_generates_as_its_program_does(tmp_path: Any) -> None:
    """Through what `graphopt generate` and `eval` open: a decoder, and steps with a mask."""
    program = with_layouts(tiny_program(**SIZES), LAYOUTS["ring and pages"])
    go.emit(program, tmp_path / "out", target="ascend910b", emit=("torch",))
    opened = [
        open_language_model(str(tmp_path / "out"), backend) for backend in ("torch", "program")
    ]
    answers = [
        list(generate_ids(model, [5, 6, 7], stop=set(), max_new_tokens=14)) for model in opened
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 14
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    one, other = (model.logits(ids, mask) for model in opened)
    torch.testing.assert_close(one[mask.bool()], other[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", [{}, {"bias": True, "norm": "layer", "tied": False}])
def test_logits_of_one_token_of_each_text_are_computed_alone(
    features: dict[str, Any], tmp_path: Any
) -> None:
    program = tiny_program(cache=True, **features)
    module, model = emitted(program, tmp_path, "ampere", torch.float32)
    ids = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    whole, _ = model(ids)
    last = torch.tensor([8, 0, 4])
    alone, cache = model(ids, last=last)
    assert alone.shape == (3, 1, 97) and cache[0][0].shape[2] == 9
    # Products of fewer rows add up in another order.
    assert torch.allclose(alone[:, 0], whole[torch.arange(3), last], rtol=1e-5, atol=1e-5)
    assert module.Decoder.last_alone


def test_a_last_call_that_mixes_tokens_gives_the_logits_of_all(tmp_path: Any) -> None:
    program = tiny_program(cache=True)
    head = program.functions["head"]
    (logits,) = head.results
    attrs = {"args": [In(0), [1]], "types": [Type((B, S, 97), torch.float32)]}
    head.results = head.add("aten.flip.default", [logits], attrs, ["flipped"]).outputs
    module, model = emitted(program, tmp_path, "ampere", torch.float32)
    assert not module.Decoder.last_alone
    assert "last" not in inspect.signature(model.forward).parameters
