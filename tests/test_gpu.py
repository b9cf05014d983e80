"""What runs on a GPU: verification, and the emitted PyTorch file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attention_programs import GENERAL, LAYOUTS, SIZES, errors
from families import captured, cases
from programs import tiny_program
from torch.nn.attention import SDPBackend, sdpa_kernel
from trained import book

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.generate.text_reader import TextReader
from graphopt.ir import functional
from graphopt.ir.relayout import with_layouts
from graphopt.lowering.kernels import get_layer_family
from graphopt.runtime import fused

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
    on_gpu = go.Pipeline.default().run(program, go.RunOptions(device="cuda"))[1].passes[-1]
    assert on_gpu.verification == "passed"
    assert on_cpu.tolerance is not None
    assert on_gpu.tolerance == pytest.approx(on_cpu.tolerance, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("head_dim", [64, 256, 320])
def test_grouped_heads_are_computed_by_a_fused_kernel(
    head_dim: int, window: int | None, kv_heads: int, dtype: torch.dtype
) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(
            2, heads, 64, head_dim, device="cuda", dtype=dtype, generator=g
        ).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    )
    with sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    ):
        out = functional.attention(q, k, v, scale=head_dim**-0.5, window=window)
        out.sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = functional.attention(*wide, scale=head_dim**-0.5, window=window)
    expected.sum().backward()
    # The scores are kept in fp32; bf16 rounds the weights and what is summed to 4e-3.
    for got, want in zip(
        (out, q.grad, k.grad, v.grad), (expected, *(x.grad for x in wide)), strict=True
    ):
        assert got is not None and want is not None
        largest = float(want.abs().max())
        bound = (2e-2 if dtype == torch.bfloat16 else 1e-5) * largest
        assert float((got.double() - want).abs().max()) <= bound


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
    # Ahead of the host's reading too, whether recorded before or meanwhile.
    for again in (decoder, module.Decoder(model, 80)):
        assert [again.start(prompt), *again.steps(29)] == tokens
        assert again.used == 68


LAYERS: list[dict[str, object]] = [
    {"head_dim": 32},
    {"head_dim": 64, "rotary_dim": 20, "interleaved": True, "bias": True, "ffn": 88},
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", LAYERS)
def test_the_kernels_of_layers_compute_what_plain_torch_does(
    features: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    program = tiny_program(cache=True, **features)  # type: ignore[arg-type]
    program.checkpoint_dtype = dtype
    go.emit(program, tmp_path / "out", target="ampere", emit=("torch",))
    module = _module(tmp_path / "out" / "model.py")
    model = module.load(tmp_path / "out")
    assert next(model.parameters()).dtype == dtype
    ids = torch.randint(0, 97, (2, 50), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        found, _ = model(ids)
        for name in get_layer_family("triton").groups[0].functions:
            setattr(module, name, getattr(functional, name))
        plain, _ = model(ids)
    # Each of the dozens of roundings on the way through may fall the other way.
    tolerance = 12 * torch.finfo(dtype).eps
    assert float((found - plain).abs().max()) < tolerance * float(plain.abs().max())


def test_kernels_of_layers_run_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not silently plain torch, which is right as well; in fp32 it is what runs."""
    called: list[tuple[object, ...]] = []
    launch = fused.launch_norm
    monkeypatch.setattr(fused, "launch_norm", lambda *a: called.append(a) or launch(*a))
    x, weight = torch.randn(3, 64, device="cuda"), torch.randn(64, device="cuda")
    assert torch.equal(fused.rms_norm(x, weight, 1e-5), functional.rms_norm(x, weight, 1e-5))
    assert not called
    half = fused.rms_norm(x.half(), weight.half(), 1e-5)
    assert len(called) == 1
    torch.testing.assert_close(half, functional.rms_norm(x.half(), weight.half(), 1e-5))


@pytest.mark.parametrize(
    ("head_dim", "target"), [(64, "ampere"), (8, "ampere"), (64, "any-gpu"), (8, "any-gpu")]
)
def test_several_texts_are_decoded_as_each_alone(
    head_dim: int, target: str, tmp_path: Path
) -> None:
    """A head of 8 has no kernel, any-gpu has none: their reference is part of a recorded step."""
    program = tiny_program(cache=True, head_dim=head_dim, window=20)
    go.emit(program, tmp_path / "out", target=target, emit=("torch",))
    module = _module(tmp_path / "out" / "model.py")
    model = module.load(tmp_path / "out")
    texts = [list(range(1, 40)), [7, 8], list(range(50, 71))]
    # Of this room any-gpu's steps are given 128 tokens.
    decoder = module.Decoder(model, 300, batch=3)
    steps = [decoder.start(texts)]
    while len(steps) < 20:
        steps.append(decoder.step())
    for row, text in enumerate(texts):
        tokens = [step[row] for step in steps]
        with torch.no_grad():
            logits = model(torch.tensor([text + tokens]).cuda())[0][0, len(text) - 1 : -1]
        best = logits.topk(2)
        for token, first, values in zip(tokens, best.indices[:, 0], best.values, strict=True):
            # Another order of adding up may turn two that are closer than its roundings.
            assert token == int(first) or float(values[0] - values[1]) < 2e-2
    assert len(module.generate(model, texts, 5)) == 3


def test_a_decoder_goes_on_with_the_token_it_is_given(tmp_path: Path) -> None:
    go.emit(
        tiny_program(cache=True, head_dim=32), tmp_path / "out", target="ampere", emit=("torch",)
    )
    opened = open_language_model(str(tmp_path / "out"))
    cache = opened.start_text(20)
    prompt = [1, 2, 3]
    for tokens in (prompt, [44], [5], [6]):
        step = complete_inputs({"input_ids": torch.tensor([tokens])})
        logits, cache = opened.step(step, cache)
        prompt = prompt if tokens is prompt else prompt + tokens
        expected = opened.logits(torch.tensor([prompt]))[:, -1:]
        torch.testing.assert_close(
            logits, expected, rtol=0, atol=1e-2 * float(expected.abs().max())
        )
    assert cache.graphs


@pytest.mark.parametrize("target", ["ampere", "hopper"])
@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.filterwarnings("error:no kernel was planned")
def test_emitted_kernels_read_every_layout(layouts: str, target: str, tmp_path: Path) -> None:
    """Unequal texts by a recorded step in caches of fixed room, and padded in one that grows."""
    program = with_layouts(tiny_program(**SIZES), LAYOUTS[layouts])
    go.emit(program, tmp_path / "out", target=target, emit=("torch",))
    module = _module(tmp_path / "out" / "model.py")
    # f16 rounds to 5e-4, a few dozen times over on the way through.
    assert errors(program, module, module.load(tmp_path / "out"), steps=12) < 1e-2


@pytest.mark.parametrize("target", ["ampere", "hopper"])
@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.filterwarnings("error:no kernel was planned")
def test_emitted_kernels_compute_what_is_asked_for(name: str, target: str, tmp_path: Path) -> None:
    program = GENERAL[name]()
    go.emit(program, tmp_path / "out", target=target, emit=("torch",))
    module = _module(tmp_path / "out" / "model.py")
    assert errors(program, module, module.load(tmp_path / "out"), steps=12) < 1e-2


def test_what_is_opened_runs_on_the_gpu_that_is_here(tmp_path: Path) -> None:
    """A program and plain PyTorch in fp32, a file for a GPU in 16 bits; and each where asked."""
    program = tiny_program(cache=True, head_dim=64)
    ids = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(0))
    for target in ("cpu", "ampere"):
        go.emit(program, tmp_path / target, target=target, emit=("torch",))
        for backend in ("program", "torch"):
            spec = str(tmp_path / target)
            found = open_language_model(spec, backend)  # type: ignore[arg-type]
            plain = open_language_model(spec, backend, device="cpu")  # type: ignore[arg-type]
            assert found.device.type == "cuda" and plain.device.type == "cpu"
            assert f"{backend} on cuda (" in found.placement
            got, want = found.log_likelihoods(ids), plain.log_likelihoods(ids)
            assert got.device.type == "cpu"
            half = target == "ampere" and backend == "torch"
            # Logits of about 3, of which 16 bits hold 8 and some hundred sums lose a few.
            torch.testing.assert_close(got, want, rtol=0, atol=0.1 if half else 1e-4)


def test_a_conversation_goes_on_in_one_cache_of_fixed_room(tmp_path: Path) -> None:
    go.emit(
        tiny_program(cache=True, head_dim=64), tmp_path / "out", target="ampere", emit=("torch",)
    )
    model = open_language_model(str(tmp_path / "out"))
    reader, text = TextReader(model), [1, 2, 3]
    for turn in range(3):
        text = [*text, *range(10 * turn, 10 * turn + 7)]
        logits = reader.next_logits(text, len(text) + 5)
        whole = TextReader(model).next_logits(text, len(text) + 5)
        torch.testing.assert_close(logits, whole, rtol=0, atol=0.1)


def test_blocks_are_trained_behind_roundings(tmp_path: Path) -> None:
    """A GPU's products are in bf16; errors of blocks in four bits are far above theirs."""
    program = go.capture(str(Path(__file__).parents[1] / "benchmarks" / "models" / "llama"))
    text = tmp_path / "text.txt"
    text.write_text(book(300), encoding="utf-8")
    recipe = "flatquant{steps=8,windows=8,seqlen=128,batch=2,distil=0.3,generated_windows=0}"
    found = []
    for device in ("cpu", "cuda"):
        options = go.RunOptions(calib=text, device=device, verify=False)
        found.append(go.Pipeline.parse(recipe).run(program, options)[1].passes[0].record)
    for on_cpu, on_gpu in zip(found[0].blocks, found[1].blocks, strict=True):
        assert on_gpu.before == pytest.approx(on_cpu.before, rel=0.1)
        assert on_gpu.after <= on_gpu.before and on_gpu.steps == 8


@pytest.mark.parametrize("target", ["cpu", "ampere", "hopper"])
def test_steps_in_an_arena_allocate_nothing(target: str, tmp_path: Path) -> None:
    """Behind the first of their kind; the plain form's attention alone allocates, and is named."""
    program = tiny_program(cache=True, head_dim=32)
    go.emit(program, tmp_path / "out", target=target, emit=("torch",))
    module = _module(tmp_path / "out" / "model.py")
    model = module.load(tmp_path / "out", device="cuda")
    text = list(range(1, 20))
    wanted = module.generate(model, text, 12)
    arena = module.arena_for(model)
    allocated: dict[str, list[int]] = {}
    run = arena.run

    def counted(key, *rest):  # type: ignore[no-untyped-def]
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        result = run(key, *rest)
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
        allocated.setdefault(key[0], []).append(after - before)
        return result

    arena.run = counted
    for _ in range(2):
        if target == "cpu":
            assert module.generate(model, text, 12, arena=arena) == wanted
            continue
        decoder = module.Decoder(model, 40, 1, arena)
        decoder.records = False  # a recorded step allocates nothing anyway
        tokens = [decoder.start([text]), *(decoder.step() for _ in range(11))]
        assert [row[0] for row in tokens] == wanted
    left_out = {name for step in arena.steps.values() for name in step.left_out}
    assert all("attention" in name for name in left_out) and (target == "cpu" or not left_out)
    if not left_out:
        assert allocated["prefill"][1:] == [0]
        assert set(allocated["decode"][1:]) == {0}
    assert arena.bytes == max(step.height for step in arena.steps.values())
    arena.run = run
    # A recorded step writes to the arena, also after a longer prompt has made it grow.
    assert module.generate(model, text, 12, arena=arena) == wanted
    longer = text * 3
    assert module.generate(model, longer, 12, arena=arena) == module.generate(model, longer, 12)
    assert module.generate(model, text, 12, arena=arena) == wanted


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "deepseek_v3", "gemma3"])
def test_programs_compute_on_a_gpu_what_they_do_on_a_cpu(family: str) -> None:
    """Mixtures among them, whose tokens are sorted and put back by places made of none."""
    program = captured(family)[1]
    inputs = cases((7,))[2].inputs
    runners = [
        Runner(program, dtype=torch.float64, device=torch.device(at)) for at in ("cpu", "cuda")
    ]
    here, there = (
        runner.logits({name: value.to(runner.device) for name, value in inputs.items()}).cpu()
        for runner in runners
    )
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(there[real], here[real], rtol=1e-9, atol=1e-9)
