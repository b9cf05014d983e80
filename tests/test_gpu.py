"""What runs on a GPU: verification, and the emitted PyTorch file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from programs import tiny_program

import graphopt as go
from graphopt.ir.execute import Runner

FEATURES: list[dict[str, object]] = [
    {},
    {"window": 5, "softcap": 2.0},
    {"alibi": True},
    {"sinks": True, "kv_heads": 1, "bias": True},
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("emitted_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verification_computes_on_the_device() -> None:
    program = tiny_program(window=3, softcap=2.0)
    on_cpu = go.Pipeline.default().run(program)[1].passes[-1]
    on_gpu = go.Pipeline.default().run(program, device="cuda")[1].passes[-1]
    assert on_gpu.verification == "passed"
    assert on_cpu.tolerance is not None
    assert on_gpu.tolerance == pytest.approx(on_cpu.tolerance, rel=1e-3)


@pytest.mark.parametrize("features", [{}, {"window": 3, "softcap": 2.0}, {"alibi": True}])
def test_the_emitted_file_computes_the_same(features: dict[str, object], tmp_path: Path) -> None:
    program = tiny_program(cache=True, **features)  # type: ignore[arg-type]
    go.emit(program, tmp_path / "out", emit=("torch",))
    module = _module(tmp_path / "out" / "model.py")
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = Runner(program, dtype=torch.float64, mode="reference").logits({"input_ids": ids})
    largest = float(expected.abs().max())
    # fp32 rounds to 6e-8 and bf16 to 4e-3, a few dozen times over on the way through.
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        model = module.load(tmp_path / "out", device="cuda", dtype=dtype)
        with torch.no_grad():
            whole, _ = model(ids.cuda())
            first, cache = model(ids[:, :7].cuda())
            second, _ = model(ids[:, 7:].cuda(), cache=cache)
        for logits in (whole, torch.cat((first, second), 1)):
            assert float((logits.cpu().double() - expected).abs().max()) < tolerance * largest
    assert module.generate(model, [1, 2, 3], 5) == module.generate(model, [1, 2, 3], 5)


@pytest.mark.parametrize("target", ["ampere", "hopper"])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.filterwarnings("error:no kernel was planned")
def test_the_emitted_kernels_compute_the_same(
    features: dict[str, object], target: str, tmp_path: Path
) -> None:
    program = tiny_program(cache=True, head_dim=32, **features)  # type: ignore[arg-type]
    go.emit(program, tmp_path / "out", target=target, emit=("torch",))
    module = _module(tmp_path / "out" / "model.py")
    model = module.load(tmp_path / "out")
    ids = torch.randint(0, 97, (2, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    for padding in (None, mask):
        inputs = {"input_ids": ids} | ({} if padding is None else {"attention_mask": padding})
        expected = Runner(program, dtype=torch.float64, mode="reference").logits(inputs)
        given = None if padding is None else padding.cuda()
        start = None if given is None else given[:, :30]
        with torch.no_grad():
            whole, _ = model(ids.cuda(), given)
            first, cache = model(ids[:, :30].cuda(), start)
            second, _ = model(ids[:, 30:].cuda(), given, cache=cache)
        real = mask.bool() if padding is not None else torch.ones_like(mask).bool()
        for logits in (whole, torch.cat((first, second), 1)):
            error = (logits.cpu().double() - expected)[real].abs().max()
            # f16 rounds to 5e-4, a few dozen times over on the way through.
            assert float(error) < 1e-2 * float(expected.abs().max())


@pytest.mark.parametrize("target", ["ampere", "hopper"])
def test_a_recorded_step_computes_what_a_step_does(target: str, tmp_path: Path) -> None:
    program = tiny_program(cache=True, head_dim=64, window=20)
    go.emit(program, tmp_path / "out", target=target, emit=("torch",))
    module = _module(tmp_path / "out" / "model.py")
    model = module.load(tmp_path / "out")
    prompt = list(range(1, 40))
    decoder = module.Decoder(model, 80)
    tokens = [decoder.start(prompt)]
    while len(tokens) < 30:
        tokens.append(decoder.step())
    text, cache = torch.tensor([prompt]).cuda(), None
    for token in tokens:
        with torch.no_grad():
            logits, cache = model(text, cache=cache)
        best = logits[0, -1].topk(2)
        # Another order of adding up may turn two that are closer than its roundings.
        assert token == int(best.indices[0]) or float(best.values[0] - best.values[1]) < 1e-2
        text = torch.tensor([[token]]).cuda()
    with pytest.raises(ValueError, match="a prompt of 80 tokens in a cache of 80"):
        decoder.start([1] * 80)
