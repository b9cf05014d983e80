"""The class that checkpoints of carved models bring; see test_hf.py for the layouts."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from carved import carved
from checkpoints import CLOSE, loaded, own_modules, padded_case
from families import captured, eager_logits, error
from torch import nn
from transformers import AutoModelForCausalLM

import graphopt as go
from graphopt.errors import LoweringError
from graphopt.execute.interpreter import Runner
from graphopt.files.safetensors import read_checkpoint
from graphopt.ir.feed_forward import Split
from graphopt.ir.graph import Program, Value
from graphopt.ir.weights import Array, Weight
from graphopt.lowering.hf import HfEmitter
from graphopt.lowering.hf import carved as carved_classes

pytestmark = pytest.mark.usefixtures(own_modules.__name__)


@functools.cache
def _dense() -> Program:
    """Return the program of a random Llama, with the config of its checkpoint."""
    model, program = captured("llama")
    program.config = model.config.to_dict()
    return go.Pipeline.default().run(program, go.RunOptions(verify=False))[0]


def _loaded(folder: Path, **options) -> nn.Module:
    return loaded(folder, trust_remote_code=True, **options)


SPLIT = Split(32, 4, 2)


def _sparse(split: Split = SPLIT, **options) -> Program:
    return carved(_dense(), split, **options)


@pytest.mark.slow
def test_names_and_shapes_of_the_tensors(tmp_path):
    go.emit(_sparse(), tmp_path / "out", emit=("hf",))
    kinds = {name: value.shape for name, value in read_checkpoint(tmp_path / "out/hf").items()}
    stem = "model.layers.1.mlp."
    assert {name.removeprefix(stem): kinds[name] for name in kinds if name.startswith(stem)} == {
        "shared.gate_proj.weight": (32, 64),
        "shared.up_proj.weight": (32, 64),
        "shared.down_proj.weight": (64, 32),
        "shared.gate_proj.bias": (32,),
        "shared.up_proj.bias": (32,),
        "shared.down_proj.bias": (64,),
        "experts.gate_up_proj": (4, 32, 64),
        "experts.gate_up_proj_bias": (4, 32),
        "experts.down_proj": (4, 64, 16),
        "router.weight": (4, 64),
        "router.bias": (4,),
    }


@pytest.mark.slow
def test_a_router_of_neurons(tmp_path):
    program = _sparse(router="neuron")
    go.emit(program, tmp_path / "out", emit=("hf",))
    found = eager_logits(_loaded(tmp_path / "out/hf"), padded_case())
    assert error(Runner(program).logits(padded_case().inputs), found, padded_case()) < CLOSE


def test_thresholds_and_added_neurons(tmp_path):
    program = _sparse(Split(33, 4, 2, threshold=True), padded=1)
    go.emit(program, tmp_path / "out", emit=("hf",))
    model, inputs = _loaded(tmp_path / "out" / "hf"), padded_case().inputs
    exact = Runner(program).logits(inputs)
    with torch.no_grad():
        found = model(**inputs).logits
    assert float((found - exact).abs().max()) < CLOSE * float(exact.abs().max())


@pytest.mark.slow
def test_with_all_experts_active_it_is_the_dense_model_in_any_precision(tmp_path):
    model, _ = captured("llama")
    model.save_pretrained(tmp_path / "source")
    program = _sparse(Split(32, 4, 4))
    go.emit(program, tmp_path / "out", emit=("hf",))
    case = padded_case()
    expected = eager_logits(model, case)
    assert error(expected, eager_logits(_loaded(tmp_path / "out/hf"), case), case) < CLOSE
    half = _loaded(tmp_path / "out/hf", dtype=torch.bfloat16)
    # What decides between experts is not rounded.
    kept = {n.split(".mlp.")[-1] for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {"router.weight", "router.bias"}
    rounded = eager_logits(_loaded(tmp_path / "source", dtype=torch.bfloat16), case).float()
    # Two models rounded in the same places: no further from each other than from the truth.
    found = eager_logits(half, case).float()
    assert error(expected, found, case) < 2 * error(expected, rounded, case)


def _with_balance(program: Program) -> Program:
    """Give every gate a bias that changes choices, and scales."""
    generator = torch.Generator().manual_seed(2)
    for function in program.functions.values():
        for node in function.nodes:
            if node.op == "top_k_gating":
                for slot in ("selection_bias", "gate_scale"):
                    function.weights[slot] = Value(slot)
                    node.inputs.append(function.weights[slot])
                count = 4
                for number, call in enumerate(program.calls):
                    if call.function == function.name:
                        for slot in ("selection_bias", "gate_scale"):
                            value = torch.randn(count, generator=generator)
                            call.weights[slot] = f"{slot}.{number}"
                            program.weights.add(Weight(f"{slot}.{number}", Array(value)))
    return program


@pytest.mark.slow
def test_biases_and_scales_of_gates_are_kept_and_trained(tmp_path):
    plain = _sparse()
    program = _with_balance(plain.copy())
    go.emit(program, tmp_path / "out", emit=("hf",))
    case = padded_case()
    expected = Runner(program).logits(case.inputs)
    # Both matter, so that one that is lost would show.
    assert error(expected, Runner(plain).logits(case.inputs), case) > 1e-2
    model = _loaded(tmp_path / "out/hf")
    assert error(expected, eager_logits(model, case), case) < CLOSE
    part = model.model.layers[0].mlp
    assert {"selection_bias", "gate_scale"} <= set(part.state_dict())
    assert part.to("meta").selection_bias.is_meta
    half = _loaded(tmp_path / "out/hf", dtype=torch.bfloat16)
    kept = half.model.layers[0].mlp
    assert kept.selection_bias.dtype == kept.gate_scale.dtype == torch.float32
    assert half.bfloat16().model.layers[0].mlp.selection_bias.dtype == torch.bfloat16
    assert bool(eager_logits(half, case).isfinite().all())

    model = _loaded(tmp_path / "out/hf").train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(case.input_ids, labels=case.input_ids, use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert float(grad.abs().max()) > 0, name
        torch.testing.assert_close(grads[1][name], grad)
    assert "model.layers.0.mlp.router.weight" in grads[0]


def _classes():
    return carved_classes._run(
        Path(carved_classes.__file__).with_name("modeling_carved.py").read_text(), "carved_template"
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5)])
def test_experts_are_the_sum_of_those_that_tokens_chose(gated, shape, monkeypatch):
    """Against a loop over tokens, in fp64, as is and as a graph runs it."""
    torch.manual_seed(0)
    experts = _classes().Experts(6, 4, 3, 5, "silu", gated, True).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(*shape, 12, dtype=torch.float64)[..., ::2]  # not contiguous
    for chosen in (
        torch.stack([torch.randperm(4)[:2] for _ in range(x[..., 0].numel())] or [torch.zeros(2)])
        [: x[..., 0].numel()].long().view(*shape, 2),
        torch.full((*shape, 1), 3),
    ):  # fmt: skip
        gates = torch.rand(chosen.shape, dtype=torch.float64)
        expected = torch.zeros(*shape, 5, dtype=torch.float64)
        first, offset = (
            experts.get_parameter(experts.first),
            experts.get_parameter(f"{experts.first}_bias"),
        )
        for place in torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape)):
            token = tuple(place.tolist())
            for number, gate in zip(chosen[token].tolist(), gates[token], strict=True):
                both = first[number] @ x[token] + offset[number]
                hidden = torch.nn.functional.silu(both[:3]) * (both[3:] if gated else 1)
                expected[token] += gate * (experts.down_proj[number] @ hidden)
        for compiling in (False, True):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda c=compiling: c)
            torch.testing.assert_close(experts(x, chosen, gates), expected)


def _refused(program: Program) -> str:
    with pytest.raises(LoweringError) as caught:
        HfEmitter().check(program, "cpu")
    assert caught.value.remedy
    return caught.value.message


def _layer(dense) -> str:
    return dense.weights["down"][0].name.partition("mlp.")[0]


@pytest.mark.slow
def test_what_the_class_would_not_compute_is_refused(tmp_path, monkeypatch):
    program = _sparse()
    other = program.copy()
    for function in other.functions.values():
        for node in function.nodes:
            if node.op == "experts":
                node.attrs["act"] = "relu"
    assert "experts(" in _refused(other) and "carved feed-forward parts" in _refused(other)

    monkeypatch.setattr(
        carved_classes._Dense, "_place", lambda self, module: ("model.layers.0.mlp", [])
    )
    assert "several layers run model.layers.0.mlp" in _refused(program)
    # A part that is put in the wrong place is found, not believed: in one it does not fit the
    # call, in one what it gives is not what the part gives.
    for wrong in ("self_attn", "post_attention_layernorm"):

        def place(self, module, wrong=wrong):
            return _layer(self) + wrong, []

        monkeypatch.setattr(carved_classes._Dense, "_place", place)
        assert "not in the place of the dense ones" in _refused(program)


def test_a_part_that_is_no_module_of_its_own_is_refused_with_its_name(tmp_path, monkeypatch):
    program = _sparse()
    monkeypatch.setattr(carved_classes, "_takes_one", lambda module: False)
    message = _refused(program)
    assert "LlamaForCausalLM" in message and "model.layers.0.mlp does more" in message


def test_the_class_is_made_from_a_config_alone(tmp_path):
    """Every parameter is drawn, none left as memory was."""
    go.emit(_sparse(), tmp_path / "out", emit=("hf",))
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tmp_path / "out/hf", trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    part = model.model.layers[0].mlp.experts
    assert float(part.gate_up_proj.std()) == pytest.approx(0.02, rel=0.1)
    assert float(part.down_proj.std()) == pytest.approx(0.02, rel=0.1)
    assert float(part.gate_up_proj_bias.abs().max()) == 0.0
