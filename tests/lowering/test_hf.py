"""Checkpoints for transformers: loaded there without a missing or unexpected key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import Case, cases, eager_logits, error, random_model
from programs import tiny_program
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import graphopt as go
from graphopt.capture.model import attention_implementation
from graphopt.errors import LoweringError
from graphopt.execute.interpreter import Runner
from graphopt.files.safetensors import read_checkpoint
from graphopt.ir import KVLayout
from graphopt.ir.blocks import remove_blocks
from graphopt.ir.relayout import with_layouts
from graphopt.ir.weights import Array, Missing, Rows, Transposed, Weight
from graphopt.lowering.hf import HfEmitter, emitter
from graphopt.lowering.hf.checkpoint_assembly import Fragment, assemble

LAYOUTS = ["llama", "gpt2", "gpt_neox", "falcon", "bloom", "phi3", "gemma2", "mpt", "mixtral",
           "codegen"]  # fmt: skip
"""Plain, transposed, interleaved, multi-query, fused by heads, fused by rows, tied, renamed,
experts one by one, fused and interleaved."""


def _program(model: nn.Module, folder: Path) -> go.Program:
    model.save_pretrained(folder)
    program, _ = go.Pipeline.default().run(go.capture(str(folder)), go.RunOptions(verify=False))
    return program


def _loaded(folder: Path) -> nn.Module:
    # As `random_model` has it: two implementations of attention differ in the last bits.
    implementation = attention_implementation(AutoConfig.from_pretrained(folder))
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=implementation, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def _case() -> Case:
    return cases(lengths=(7,))[-1]


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_checkpoint_goes_through_and_comes_back_the_same(family: str, tmp_path: Path) -> None:
    model, case = random_model(family), _case()
    program = _program(model, tmp_path / "source")
    go.emit(program, tmp_path / "out", emit=("hf",))
    again = _loaded(tmp_path / "out" / "hf")
    # The same class with the same weights: bit for bit.
    assert torch.equal(eager_logits(model, case), eager_logits(again, case))
    names = [set(read_checkpoint(tmp_path / part)) for part in ("source", "out/hf")]
    assert names[0] == names[1]
    assert again.config.use_cache == model.config.use_cache
    assert again.config.architectures == [type(model).__name__]


def test_an_output_folder_is_a_model_again(tmp_path: Path) -> None:
    model, case = random_model("gpt2"), _case()
    go.emit(_program(model, tmp_path / "source"), tmp_path / "out", emit=("hf",))
    program = go.capture(str(tmp_path / "out"))
    assert error(eager_logits(model, case), Runner(program).logits(case.inputs), case) < 1e-5
    # What lies in hf/ is not stored twice; weights cut out of a fused one are.
    stored = set(read_checkpoint(tmp_path / "out"))
    trained = {weight.name for weight in program.used_weights() if not weight.constant}
    assert stored & trained == {name for name in trained if ".c_attn." in name}


def test_layouts_of_caches_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    program = _program(random_model("llama"), tmp_path / "source")
    HfEmitter().check(with_layouts(program, {"kv.1": KVLayout("paged", 4)}), "cpu")


def test_large_checkpoints_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emitter, "LARGEST_SHARD", 100_000)
    model, case = random_model("llama"), _case()
    go.emit(_program(model, tmp_path / "source"), tmp_path / "out", emit=("hf",))
    files = sorted(path.name for path in (tmp_path / "out/hf").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(eager_logits(model, case), eager_logits(_loaded(tmp_path / "out/hf"), case))


@pytest.mark.parametrize("family", ["olmo3", "gemma3_text", "gpt_neo"])
def test_layers_of_one_kind_alone_are_what_a_config_makes(family: str, tmp_path: Path) -> None:
    """Captured with both kinds, and again with one: parameters and operands in another order."""
    model, case = random_model(family), _case()
    model.save_pretrained(tmp_path / "source")
    program = go.capture(str(tmp_path / "source"))
    windows = model.config.layer_types if family != "gpt_neo" else model.config.attention_layers
    for kind in set(windows):
        pruned = program.copy()
        remove_blocks(pruned, [index for index, own in enumerate(windows) if own == kind])
        go.emit(pruned, tmp_path / kind, emit=("hf",))
        again = _loaded(tmp_path / kind / "hf")
        expected = Runner(pruned).logits(case.inputs)
        assert error(expected, eager_logits(again, case), case) < 1e-5
        assert again.config.num_hidden_layers == len(windows) - windows.count(kind)


def test_trained_buffers_are_weights(tmp_path: Path) -> None:
    """The bias of DeepSeek's router is a buffer of the class, and differs from layer to layer."""
    model, case = random_model("deepseek_v3"), _case()
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    program = _program(model, tmp_path / "source")
    assert error(eager_logits(model, case), Runner(program).logits(case.inputs), case) < 1e-4
    go.emit(program, tmp_path / "out", emit=("hf",))
    assert torch.equal(eager_logits(model, case), eager_logits(_loaded(tmp_path / "out/hf"), case))


def _refused(program: go.Program) -> str:
    with pytest.raises(LoweringError) as caught:
        HfEmitter().check(program, "cpu")
    assert caught.value.remedy
    return caught.value.message


def test_what_no_config_makes_is_refused_with_the_reason(tmp_path: Path) -> None:
    program = _program(random_model("gemma2"), tmp_path)
    HfEmitter().check(program, "cpu")

    changed = program.copy()
    for node in changed.functions["block"].nodes:
        if node.op == "gelu_tanh":
            node.op = "gelu"
    assert "model.layers.0: gelu(" in _refused(changed)
    assert "not gelu_tanh(" in _refused(changed)

    shorter = program.copy()
    del shorter.calls[2]
    shorter.calls[2].args = list(program.calls[2].args)
    assert "it has 5 calls, not 6" in _refused(shorter)
    shorter.config["num_hidden_layers"] = 3
    del shorter.config["layer_types"][1]
    HfEmitter().check(shorter, "cpu")  # without a block it is a checkpoint again, with its config

    wide = program.copy()
    for part, shape in {"gate": (102, 64), "up": (102, 64), "down": (64, 102)}.items():
        name = wide.calls[1].weights[f"mlp.{part}_proj.weight"]
        wide.weights.replace(Weight(name, Array(torch.zeros(shape)), name))
    assert "_proj.weight' is [" in _refused(wide)

    untied = program.copy()
    head = untied.calls[-1].weights
    value = untied.weights[head["lm_head.weight"]].load().clone()
    untied.weights.add(Weight("own", Array(value)))
    head["lm_head.weight"] = "own"
    assert "the config ties" in _refused(untied)
    untied.config["tie_word_embeddings"] = False
    HfEmitter().check(untied, "cpu")

    turned = program.copy()
    slot = next(s for s in turned.calls[0].weights if "inv_freq" in s)
    name = turned.calls[0].weights[slot]
    value = turned.weights[name].load() * 2
    turned.weights.replace(Weight(name, Array(value), constant=True))
    assert "is not what the config makes it" in _refused(turned)


def test_a_module_without_a_config_has_no_checkpoint() -> None:
    assert "without a transformers config" in _refused(tiny_program())


def test_parts_must_fill_the_tensor() -> None:
    whole = torch.arange(24.0).view(4, 6)
    base = Missing((4, 6), torch.float32, "w")
    cut = (Transposed(base), Rows(Transposed(base), slice(0, 6, 2)))
    rest = (Transposed(base), Rows(Transposed(base), (1, 3, 5)))
    even, odd = Fragment(cut, Array(whole.t()[::2])), Fragment(rest, Array(whole.t()[[1, 3, 5]]))
    assert torch.equal(assemble((4, 6), [even, odd]).load(), whole)
    with pytest.raises(ValueError, match="12 of its 24 elements"):
        assemble((4, 6), [even])
