"""Emitted models with packed weights on a target with kernels that read the codes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_emulator import COMPILER
from emitted import load_file
from hopper_emulator import on_this_machine
from packed_programs import projections, with_packed
from programs import tiny_program
from sampling import exhaustive_but

import graphopt as go
from graphopt.execute.interpreter import Runner
from graphopt.ir import Packed, Program
from graphopt.lowering.kernels import triton as triton_family
from graphopt.lowering.torch.passes import lower, lowering_passes
from graphopt.pass_manager.contract import Context, make_pass
from graphopt.targets import get_target

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

SIZES: dict[str, Any] = {"hidden": 64, "head_dim": 16, "ffn": 96, "cache": True}
ENCODINGS = {
    "group 32": Packed(4, 32),
    "zero points": Packed(4, 32, symmetric=False),
}


def reference(program: Program, texts: list[list[int]]) -> list[torch.Tensor]:
    """Return the logits behind each text in fp64."""
    runner = Runner(program, dtype=torch.float64, mode="reference")
    return [runner.logits({"input_ids": torch.tensor([text])})[0, -1] for text in texts]


def emitted(program: Program, out: Path) -> tuple[ModuleType, str]:
    go.emit(program, out, target="ampere", emit=("torch",))
    return load_file(out / "model.py"), (out / "model.py").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py has it")
@pytest.mark.filterwarnings("ignore:attention on a CPU")
@pytest.mark.parametrize("name", exhaustive_but(ENCODINGS, "zero points"))
def test_an_emitted_model_reads_codes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = with_packed(tiny_program(bias=True, **SIZES), projections(ENCODINGS[name]))
    module, text = emitted(program, tmp_path / "out")
    assert "QuantisedWeight = kernels.QuantisedWeight" in text and "def dequantise(" not in text
    assert "self.q_k_v_proj.sizes, -1" in text
    kernels = sys.modules[f"{module.kernels.__name__}.quantised_linear"]
    monkeypatch.setattr(kernels, "runs_by_kernel", lambda *tensors: True)
    launched: list[int] = []
    launch = kernels.launch_packed
    monkeypatch.setattr(
        kernels, "launch_packed", lambda x, *rest: launched.append(len(x)) or launch(x, *rest)
    )
    model = module.load(tmp_path / "out", dtype=torch.float16)
    texts = [[5, 6, 7, 8, 9], [1, 2]]
    decoder = module.Decoder(model, 12, batch=2)
    answers = [[token] for token in decoder.start(texts)]
    for _ in range(2):
        wanted = reference(
            program, [[*text, *answer[:-1]] for text, answer in zip(texts, answers, strict=True)]
        )
        for row, expected in enumerate(wanted):
            # Two dozen roundings to f16 on the way through, most of them averaged out, and one of
            # each scale.
            bound = 24 * 2.0**-11 * float(expected.abs().max())
            assert float((decoder.logits[row].double() - expected).abs().max()) < bound
        for answer, token in zip(answers, decoder.step(), strict=True):
            answer.append(token)
    # In a layer q, k and v; o; gate and up; down; then the head, of each text's newest token alone.
    assert launched == [10] * 8 + [2] * 19


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU its kernels run")
@pytest.mark.filterwarnings("ignore:attention on a CPU")
@pytest.mark.parametrize("group", [128, pytest.param(32, marks=pytest.mark.exhaustive)])
def test_on_hopper_the_kernel_in_cuda_takes_every_product_of_a_step(
    group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden": 128, "heads": 8, "kv_heads": 4, "head_dim": 16, "ffn": 256, "cache": True}
    program = with_packed(tiny_program(**sizes), projections(Packed(4, group)))
    go.emit(program, tmp_path / "out", target="hopper", emit=("torch",))
    assert (tmp_path / "out" / "kernels" / "hopper_packed_few.cu").is_file()
    module = load_file(tmp_path / "out" / "model.py")
    kernels, few = (
        sys.modules[f"{module.kernels.__name__}.{name}"]
        for name in ("quantised_linear", "packed_few")
    )
    monkeypatch.setattr(kernels, "runs_by_kernel", lambda *tensors: True)
    monkeypatch.setattr(few, "runs_compiled", lambda device: True)
    asked: list[tuple[bool, str]] = []

    def launch(
        x: Any, weight: Any, bias: Any, tiles: Any, cores: int, x_scales: Any = None,
        act: str = "", front: Any = None,
    ) -> Any:  # fmt: skip
        assert few._refusal(x, weight, bias, front) == ""
        asked.append((front is not None, act))
        y = x.new_zeros(len(x), weight.shape[0] // (2 if act else 1))
        return y, None if front is None or front.y is None else x + front.y

    monkeypatch.setattr(kernels, "launch_few", launch)
    decoder = module.Decoder(module.load(tmp_path / "out", dtype=torch.float16), 12)
    for step in (lambda: decoder.start([5, 6, 7]), decoder.step):
        asked.clear()
        step()
        # Of each layer q, k and v; o; gate and up; down; then the head.
        layer = [(True, ""), (False, ""), (True, "silu"), (False, "")]
        assert asked == [*layer, *layer, (True, "")]


def in_front(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let products of up to so many tokens transform what they read."""
    table = get_target("hopper").quantised
    assert table is not None
    monkeypatch.setitem(table["front"], "tokens", tokens)


def with_transforms(**features: Any) -> Program:
    """Return a program of transforms and packed weights of more inputs than a span."""
    sizes = {"hidden": 128, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn": 384, "cache": True}
    program = tiny_program(**{**sizes, **features})
    for name, options in (("insert-affine", {"kind": "random"}), ("fold-affine", {})):
        program = make_pass(name, options).run(program, Context()).program
    return with_packed(program, projections(Packed(4, 128)))


@pytest.mark.slow
def test_transforms_in_front_of_products_are_computed_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = with_transforms(bias=True)
    in_front(0, monkeypatch)
    before = str(lower(program, "hopper"))
    assert before.count(" transformed(") == 4 and "transformed_packed_linear(" not in before
    in_front(1, monkeypatch)
    lowered, report = go.Pipeline(lowering_passes("hopper")).run(program)
    assert report.passes[1].verification == "passed"
    ops = [node.op for node in lowered.functions["block"].nodes]
    # Of q, k and v; o; gate and up; down.
    assert ops.count("transformed_packed_linear") == 4 and "transformed" not in ops
    # Queries and keys behind their rotation.
    assert "kronecker" not in ops and "queries, self_attn.k_proj.transform.keys)" in str(lowered)
    assert not {"add_rms_norm", "act_mul", "packed_linear", "norm_packed_linear"} & {*ops}
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    exact = Runner(program, dtype=torch.float64, mode="reference").logits({"input_ids": ids})
    for mode in ("reference", "torch"):
        found = Runner(lowered, dtype=torch.float64, mode=mode).logits({"input_ids": ids})
        # Sums in another order, in fp64.
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)
    assert "transformed_packed_linear(" not in str(lower(program, "ampere"))


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="there is no g++ to run the kernels with")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU its kernels run")
@pytest.mark.filterwarnings("ignore:attention on a CPU")
@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_an_emitted_model_transforms_a_token_in_front_of_its_products(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_front(1, monkeypatch)
    program = with_transforms(layers=1, ffn=128)
    go.emit(program, tmp_path / "out", target="hopper", emit=("torch",))
    module = load_file(tmp_path / "out" / "model.py")
    text = (tmp_path / "out" / "model.py").read_text(encoding="utf-8")
    assert text.count("transformed_packed_linear(") == 4 and "def transformed(" not in text
    linears, fronted, few = (
        sys.modules[f"{module.kernels.__name__}.{name}"]
        for name in ("quantised_linear", "transformed_linear", "packed_few")
    )
    for kernels in (linears, fronted):
        monkeypatch.setattr(kernels, "runs_by_kernel", lambda *tensors: True)
    on_this_machine(monkeypatch, few)
    asked: list[tuple[int, str]] = []
    launch = linears.launch_few

    def launched(x: torch.Tensor, *rest: Any, front: Any = None, **options: Any) -> Any:
        found = launch(x, *rest, front=front, **options)
        if found is not None and front is not None and (front.left, front.right) != (None, None):
            asked.append((len(x), front.before))
        return found

    monkeypatch.setattr(linears, "launch_few", launched)
    model = module.load(tmp_path / "out", dtype=torch.float16)
    for parameter in model.parameters():
        # Out of the file, where they lie anyhow, as they are on a GPU.
        parameter.data = parameter.data.clone()
    decoder = module.Decoder(model, 12)
    prompt = [5, 6, 7][:count]
    first = decoder.start(prompt)
    step = [(1, "norm"), (1, ""), (1, "norm"), (1, "silu")]
    # A prompt of several tokens is transformed by kernels of their own.
    assert asked == (step if count == 1 else [])
    decoder.step()
    assert asked[-4:] == step
    (expected,) = reference(program, [[*prompt, first]])
    # As of packed weights alone, and four roundings more.
    bound = 28 * 2.0**-11 * float(expected.abs().max())
    assert float((decoder.logits[0].double() - expected).abs().max()) < bound


@pytest.mark.filterwarnings("ignore:attention on a CPU")
@pytest.mark.parametrize("tied", [False, True])
def test_on_a_cpu_such_a_model_computes_by_the_reference(tied: bool, tmp_path: Path) -> None:
    program = with_packed(tiny_program(tied=tied, **SIZES), projections(Packed(4, 32)))
    module, _ = emitted(program, tmp_path / "out")
    text = [5, 6, 7, 8, 9]
    logits, _ = module.load(tmp_path / "out", device="cpu")(torch.tensor([text]))
    (expected,) = reference(program, [text])
    # Norms, biases and scales are stored in bf16, which is what the target computes in.
    bound = 24 * 2.0**-9 * float(expected.abs().max())
    assert float((logits[0, -1].double() - expected).abs().max()) < bound


@pytest.mark.filterwarnings("ignore:attention on a CPU")
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_model_for_a_target_without_tiles_of_codes_joins_its_weights_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_family, "quantised_tiles", lambda target: None)
    program = with_packed(tiny_program(bias=True, **SIZES), projections(ENCODINGS[name]))
    module, text = emitted(program, tmp_path / "out")
    assert "class QuantisedWeight(" in text
    tokens = [5, 6, 7, 8, 9]
    model = module.load(tmp_path / "out", device="cpu")
    assert any(len(m.sizes) == 3 for m in model.modules() if hasattr(m, "sizes"))
    logits, _ = model(torch.tensor([tokens]))
    (expected,) = reference(program, [tokens])
    # Norms, biases and scales are stored in bf16, which is what the target computes in.
    bound = 24 * 2.0**-9 * float(expected.abs().max())
    assert float((logits[0, -1].double() - expected).abs().max()) < bound


def test_lowering_gives_packed_linears_to_kernels_and_says_what_it_leaves() -> None:
    mixed = {
        "layers.0.self_attn.k_proj.weight": Packed(4, 64),
        "layers.0.self_attn.o_proj.weight": Packed(8, 32),
        "layers.0.mlp.down_proj.weight": Packed(4, 24),
        "layers.1.mlp.up_proj.weight": Packed(4, 32, axis=0),
    }
    program = with_packed(
        tiny_program(layers=3, **SIZES),
        lambda name: mixed.get(name, projections(Packed(4, 32))(name)),
    )
    lowered, report = go.Pipeline(lowering_passes("hopper")).run(program)
    assert str(lowered) == str(lower(program, "hopper"))
    fused = report.passes[1]
    assert fused.verification == "passed" and fused.record is not None
    text = str(lowered)
    # In the first layer q and v, k, gate and up; in the second q, k and v, o, gate, down; in the
    # third the second's with gate and up; and the head.
    assert fused.record.rules["fuse_packed_linears"] == 3 + 4 + 4 + 1
    assert text.count("parts=3)") == 2 and text.count("parts=2)") == 1
    assert text.count('parts=2, act="silu")') == 2
    for kind in (
        "packed(bits=8, group=32, axis=1, symmetric)",
        "packed(bits=4, group=24, axis=1, symmetric)",
        "packed(bits=4, group=32, axis=0, symmetric)",
    ):
        reason = f"fuse_packed_linears: its weight is {kind}, and kernels read other codes"
        assert fused.record.left[reason] == 1


def test_a_packed_linear_is_of_packed_weights() -> None:
    program = with_packed(tiny_program(**SIZES), projections(Packed(4, 32)))
    lowered = lower(program, "ampere")
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    exact = Runner(program, dtype=torch.float64, mode="reference").logits({"input_ids": ids})
    for mode in ("reference", "torch"):
        found = Runner(lowered, dtype=torch.float64, mode=mode).logits({"input_ids": ids})
        # Sums in another order, in fp64.
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


FOUR = "canonicalise,insert-affine{kind=random},fold-affine,quantize{w=4,a=%d,group=0,method=rtn}"


def with_activations(bits: int, **features: Any) -> Program:
    """Return a program of transforms, packed weights and rounded activations, with a cache."""
    program = tiny_program(**{**SIZES, "cache": False, **features})
    recipe = go.Pipeline.parse(f"{FOUR % bits},insert-kv-cache")
    return recipe.run(program, go.RunOptions(verify=False))[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_lowering_joins_norms_gates_transforms_and_rounding(bits: int) -> None:
    program = with_activations(bits)
    lowered = lower(program, "ampere")
    ops = [node.op for node in lowered.functions["block"].nodes]
    # Of the block's input, of what o reads, of its second half's input and of what down reads.
    assert ops.count("transformed") == 4 and ops.count("integer_linear") == 4
    assert ops.count("kronecker") == 2  # queries and keys, by a dense factor of a head
    assert not {"rms_norm", "add_rms_norm", "act_mul", "linear", "packed_linear"} & {*ops}
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    exact = Runner(program, dtype=torch.float64, mode="reference").logits({"input_ids": ids})
    for mode in ("reference", "torch"):
        found = Runner(lowered, dtype=torch.float64, mode=mode).logits({"input_ids": ids})
        # Sums in another order, in fp64.
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py has it")
@pytest.mark.filterwarnings("ignore:attention on a CPU")
@pytest.mark.parametrize("bits", [4, 8])
def test_an_emitted_model_computes_with_codes(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, text = emitted(with_activations(bits, bias=True), tmp_path / "out")
    for name in ("transformed", "integer_linear"):
        assert f"{name} = kernels.{name}" in text and f"def {name}(" not in text
    prompt = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]])
    wide, plain = (
        module.load(tmp_path / "out", dtype=dtype)(prompt)[0].double()
        for dtype in (torch.float32, torch.float16)
    )
    launched: list[str] = []
    for name in ("quantised_linear", "transforms"):
        kernels = sys.modules[f"{module.kernels.__name__}.{name}"]
        monkeypatch.setattr(kernels, "runs_by_kernel", lambda *tensors: True)
        for function in ("launch_packed", "launch_transform"):
            if hasattr(kernels, function):
                launch = getattr(kernels, function)
                monkeypatch.setattr(
                    kernels,
                    function,
                    lambda *rest, _launch=launch, _name=function, **options: (
                        launched.append(_name) or _launch(*rest, **options)
                    ),
                )
    model = module.load(tmp_path / "out", dtype=torch.float16)
    found = model(prompt)[0].double()
    assert launched.count("launch_transform") == 8 and launched.count("launch_packed") == 8
    # A rounding may turn a code to its neighbour, in either way of computing in 16 bits.
    assert float((found - wide).square().mean()) < 1.5 * float((plain - wide).square().mean())


ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        # Roundings to bf16 on the way; codes of activations may turn to their neighbours.
        pytest.param("weights", 3e-2, marks=ON_GPU),
        pytest.param("codes of 8 bits", 6e-2, marks=ON_GPU),
        pytest.param("transforms in front", 3e-2, marks=ON_GPU),
    ],
)
def test_on_a_gpu_a_recorded_step_computes_what_plain_torch_does(
    kind: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden": 256, "head_dim": 64, "ffn": 384}
    if kind == "weights":
        program = with_packed(tiny_program(**sizes, cache=True), projections(Packed(4, 32)))
    elif kind == "transforms in front":
        in_front(1, monkeypatch)
        program = with_transforms(**sizes)
    else:
        program = with_activations(8, **sizes)
    go.emit(program, tmp_path / "out", target="hopper", emit=("torch",))
    module = load_file(tmp_path / "out" / "model.py")
    text = [5, 6, 7, 8, 9, 10, 11, 12]
    decoder = module.Decoder(module.load(tmp_path / "out", device="cuda"), 24)
    answer = [decoder.start(text)]
    for _ in range(6):
        answer.append(decoder.step())
    found = decoder.logits[0].double()
    kernels = sys.modules[f"{module.kernels.__name__}.fused"]
    monkeypatch.setattr(kernels, "runs_by_kernel", lambda *tensors: False)
    for name in ("quantised_linear", "transforms", "transformed_linear"):
        if f"{module.kernels.__name__}.{name}" in sys.modules:
            other = sys.modules[f"{module.kernels.__name__}.{name}"]
            monkeypatch.setattr(other, "runs_by_kernel", lambda *tensors: False)
    model = module.load(tmp_path / "out", device="cuda", dtype=torch.float32)
    ids = torch.tensor([[*text, *answer[:-1]]], device="cuda")
    expected = model(ids)[0][0, -1].double()
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
