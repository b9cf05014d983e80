"""Quantised checkpoints: read as packed weights that stand for what the formats say, and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quantised_checkpoints as formats
import torch
from families import mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_checkpoints import Quantised, Written, write
from safetensors.torch import load_file
from sampling import exhaustive_but
from torch import Tensor
from transformers import AutoModelForCausalLM

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.capture import capture
from graphopt.errors import SourceError
from graphopt.execute.interpreter import Runner
from graphopt.ir import Packed, Program
from graphopt.ir.weights import Array
from graphopt.sources import open_model
from graphopt.sources.quantised.awq import Awq
from graphopt.sources.quantised.compressed_tensors import CompressedTensors
from graphopt.sources.quantised.gptq import Gptq

pytestmark = pytest.mark.oldest

INPUTS = {
    "input_ids": torch.tensor([[5, 3, 9, 2, 11, 7], [1, 6, 7, 8, 4, 2]]),
    "attention_mask": torch.ones(2, 6, dtype=torch.int64),
}

PHI3 = {"head_dim": None, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300}


def linears(module: str) -> bool:
    return "_proj" in module or ".c_" in module or ".fc" in module


def checkpoint(
    folder: Path,
    method: str,
    family: str = "llama",
    *,
    config: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **entries: Any,
) -> Written:
    """Write a model whose projections are quantised by a method."""
    generator = torch.Generator().manual_seed(1)
    options = dict(options or {})
    version = options.pop("version", 1)
    sample: list[Quantised] = []

    def quantise(module: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor] | None:
        if not linears(module):
            return None
        turned = family == "gpt2"  # whose class has [in, out], and whose parts are of [out, in]
        matrix = Quantised.random(shape[::-1] if turned else shape, generator, **options)
        sample.append(matrix)
        parts = {
            "gptq": lambda: formats.gptq(matrix, version),
            "awq": lambda: formats.awq(matrix),
            "pack": lambda: formats.packed(matrix),
            "int": lambda: formats.int8(matrix),
        }[method]()
        value = matrix.value()
        return parts, value.t() if turned else value

    symmetric = bool(options.get("symmetric"))
    bits, group = options.get("bits", 4), options.get("group", 16)
    stated: dict[str, Any] = {
        "gptq": {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": symmetric,
                 "desc_act": bool(options.get("order")),
                 "checkpoint_format": "gptq" if version == 1 else "gptq_v2"},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
                "zero_point": True},
    }.get(method) or {
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "format": f"{method}-quantized",
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {"num_bits": bits, "type": "int"},
            "input_activations": None,
        }},
    }  # fmt: skip
    stated |= config or {}
    return write(folder, family, quantise, {"quantization_config": stated}, **entries)


def check(
    written: Written, *, packed: bool = True, fused: bool = False, turned: bool = False
) -> Program:
    """Open a checkpoint; its weights must be what the format says, and its logits transformers'.

    Args:
        fused: Some weights are rows of the checkpoint's.
        turned: The class has [in, out].
    """
    program = capture(str(written.folder))
    held = {weight.name: weight for weight in program.weights}
    for name, value in written.values.items():
        if name in held:
            assert held[name].load().equal(value.t() if turned else value), name
            assert (held[name].encoding is not None) == packed
    assert fused or set(written.values) <= set(held)
    trained = {name for name in held if linears(name) and name.endswith(".weight")}
    assert all((held[name].encoding is not None) == packed for name in trained)
    dense = AutoModelForCausalLM.from_pretrained(
        written.folder.parent / "dense", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    dense.load_state_dict({k: v.float() for k, v in written.values.items()}, strict=False)
    with torch.no_grad():
        expected = dense(**INPUTS).logits
    logits = Runner(program).logits(INPUTS)
    assert float((logits - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))
    return program


GPTQ: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "version 1": ("llama", {}, {}),
    "version 2, zeros of 0": ("llama", {"version": 2, "least_zero": 0}, {}),
    "symmetric": ("qwen2", {"symmetric": True}, {}),
    "8 bits, a scale a channel": ("llama", {"bits": 8, "group": None, "symmetric": True}, {}),
    "2 bits": ("llama", {"bits": 2}, {}),
    "3 bits": ("llama", {"bits": 3, "symmetric": True, "group": 32},
               {"hidden_size": 64, "intermediate_size": 64}),
    "fused": ("phi3", {}, PHI3),
    "Conv1D": ("gpt2", {}, GPT2),
    "biases": ("opt", {}, {"ffn_dim": 64, "word_embed_proj_dim": 32}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "label", mostly_slow(list(GPTQ), ("version 1", "fused"), ("symmetric", "biases"))
)
def test_gptq(label: str, tmp_path: Path) -> None:
    family, options, entries = GPTQ[label]
    program = check(
        checkpoint(tmp_path, "gptq", family, options=options, **entries),
        fused=label in ("fused", "Conv1D"), turned=label == "Conv1D",
    )  # fmt: skip
    encodings = {w.encoding for w in program.weights if w.encoding is not None}
    assert {e.symmetric for e in encodings} == {bool(options.get("symmetric"))}
    assert {e.bits for e in encodings} == {options.get("bits", 4)}
    assert {e.axis for e in encodings} == {1}
    assert "quantization_config" not in program.config


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_in_the_order_of_activations_is_dense(symmetric: bool, tmp_path: Path) -> None:
    written = checkpoint(tmp_path, "gptq", options={"order": True, "symmetric": symmetric})
    program = check(written, packed=False)
    assert any("in the order of their activations" in what for _, what in program.notes)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from((2, 4, 8)), st.integers(1, 3), st.integers(0, 99))
def test_zero_points_of_version_1_come_back_from_what_they_borrowed(bits, groups, seed):
    """A zero point of 0 less one borrows from its neighbour in the word."""
    generator = torch.Generator().manual_seed(seed)
    matrix = Quantised.random((32, 16 * groups), generator, bits=bits, least_zero=0)
    parts = {name: Array(value) for name, value in formats.gptq(matrix, 1).items()}
    method = Gptq.of("config", {"bits": bits, "sym": False})
    read = method.read({f"m.{name}": part for name, part in parts.items()}, torch.float16)
    assert list(read.tensors) == ["m.weight"] and not read.notes
    assert read.tensors["m.weight"].load().equal(matrix.value())
    assert read.tensors["m.weight"].load_rows(3, 9).equal(matrix.value()[3:9])


UNEVEN = {
    "gptq": lambda size: Gptq.of("config", {"bits": 4, "group_size": size, "sym": False}),
    "awq": lambda size: Awq.of("config", {"bits": 4, "group_size": size}),
    "pack": lambda size: CompressedTensors.of("config", {"config_groups": {
        "a": {"weights": {"num_bits": 4, "strategy": "group", "group_size": size}},
        # Of other layers, of which this may be one as far as the sizes tell.
        "b": {"weights": {"num_bits": 8, "strategy": "channel"}}}}),
}  # fmt: skip
PARTS = {"gptq": formats.gptq, "awq": formats.awq, "pack": formats.packed}


@pytest.mark.parametrize("method", UNEVEN)
def test_groups_are_of_the_size_that_is_stated(method: str) -> None:
    """Of 56 inputs in groups of 16 the last group has 8, where equal ones would have 14."""
    generator = torch.Generator().manual_seed(4)
    matrix = Quantised.random((32, 64), generator)
    whole = {f"m.{name}": Array(value) for name, value in PARTS[method](matrix).items()}
    whole.pop("m.g_idx", None)
    assert UNEVEN[method](16).read(whole, torch.float16).tensors["m.weight"].encoding == Packed(
        4, 16, symmetric=False
    )
    with pytest.raises(SourceError, match="'m' do not fit together"):
        UNEVEN[method](32).read(whole, torch.float16)
    matrix.codes, matrix.groups = matrix.codes[:, :56], matrix.groups[:56]
    parts = {f"m.{name}": Array(value) for name, value in PARTS[method](matrix).items()}
    parts.pop("m.g_idx", None)
    if method == "awq":  # whose tools take no such layer
        with pytest.raises(SourceError, match="'m' do not fit together"):
            UNEVEN[method](16).read(parts, torch.float16)
        return
    read = UNEVEN[method](16).read(parts, torch.float16)
    weight = read.tensors["m.weight"]
    assert weight.encoding is None and weight.load().equal(matrix.value())
    assert weight.load_rows(3, 9).equal(matrix.value()[3:9])
    (note,) = read.notes
    assert (
        note
        == "m: its 56 inputs are no multiple of its groups of 16, so it is read as dense values"
    )


def test_layers_of_gptq_are_what_dynamic_states_of_them() -> None:
    generator = torch.Generator().manual_seed(5)
    entries = {"bits": 4, "group_size": 16, "sym": False, "dynamic": {
        r"-:lm_head": {}, r"+:.*\.down": {"bits": 8, "group_size": 32, "sym": True},
        r".*": {"group_size": 8}}}  # fmt: skip
    down = Quantised.random((32, 32), generator, bits=8, group=32, symmetric=True)
    up = Quantised.random((32, 32), generator, group=8)
    layers = {"m.down": down, "m.up": up}
    tensors = {f"{module}.{name}": Array(part) for module, matrix in layers.items()
               for name, part in formats.gptq(matrix).items()}  # fmt: skip
    read = Gptq.of("config", entries).read(tensors, torch.float16).tensors
    assert read["m.down.weight"].encoding == Packed(8, 32)
    assert read["m.up.weight"].encoding == Packed(4, 8, symmetric=False)
    for module, matrix in layers.items():
        assert read[f"{module}.weight"].load().equal(matrix.value())
    with pytest.raises(SourceError, match="states GPTQ with 5 bits"):
        Gptq.of("config", {"bits": 4, "dynamic": {"a": {"bits": 5}}})
    with pytest.raises(SourceError, match=r"states the pattern of layers '\('"):
        Gptq.of("config", {"bits": 4, "dynamic": {"(": {"bits": 4}}})
    for slow in ("(a+)+$", "(.*a){9}", ".*.*.*.*.*.*b"):
        with pytest.raises(SourceError, match="so many repeats"):
            Gptq.of("config", {"bits": 4, "dynamic": {slow: {"bits": 4}}})
    Gptq.of("config", {"bits": 4, "dynamic": {r"+:.*\.(1[0-9]|2\d)\..*(gate|up).*": {"bits": 4}}})


def test_zero_points_of_3_bits_are_refused_of_single_layers_too() -> None:
    generator = torch.Generator().manual_seed(6)
    matrix = Quantised.random((32, 32), generator, bits=3, group=32)
    parts = {f"m.{name}": Array(part) for name, part in formats.gptq(matrix, 2).items()}
    entries: dict[str, Any] = {"bits": 4, "sym": False, "dynamic": {"m": {"bits": 3}}}
    with pytest.raises(SourceError, match="states zero points of 3 bits"):
        Gptq.of("config", entries).read(parts, torch.float16)
    second = Gptq.of("config", entries | {"checkpoint_format": "gptq_v2"})
    assert second.read(parts, torch.float16).tensors["m.weight"].load().equal(matrix.value())
    # In that format they can be checked where there should be none.
    symmetric = Gptq.of("config", {"bits": 3, "checkpoint_format": "gptq_v2"})
    with pytest.raises(SourceError, match="are not all 4"):
        symmetric.read(parts, torch.float16).tensors["m.weight"].load()


def test_blocks_of_fp8_are_those_that_have_so_many_scales() -> None:
    generator = torch.Generator().manual_seed(7)
    groups = {name: {"weights": {"num_bits": 8, "type": "float", "block_structure": size}}
              for name, size in (("a", [32, 32]), ("b", [16, 32]))}  # fmt: skip
    weight = torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 2, generator=generator)
    parts = {"m.weight": Array(weight), "m.weight_scale": Array(scales)}
    stated = {"config_groups": groups}
    read = CompressedTensors.of("config", stated).read(parts, torch.float32).tensors["m.weight"]
    wide = scales.repeat_interleave(16, 0).repeat_interleave(32, 1)
    assert read.load().equal(weight.float() * wide)
    groups["c"] = {"weights": {"num_bits": 8, "type": "float", "block_structure": [20, 32]}}
    with pytest.raises(SourceError, match="blocks of more sizes than one"):
        CompressedTensors.of("config", stated).read(parts, torch.float32)


@pytest.mark.parametrize("family", mostly_slow(["llama", "phi3", "qwen3"], ("llama",)))
def test_awq(family: str, tmp_path: Path) -> None:
    entries = PHI3 if family == "phi3" else {}
    options = {"least_zero": 0}
    written = checkpoint(tmp_path, "awq", family, options=options, **entries)
    program = check(written, fused=family == "phi3")
    assert {w.encoding for w in program.weights} == {None, Packed(4, 16, symmetric=False)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("pack", {"symmetric": True}),
        ("pack", {"bits": 8, "group": None, "symmetric": True, "dtype": torch.bfloat16}),
        ("pack", {"least_zero": 0, "group": 8}),
        ("pack", {"bits": 2, "least_zero": 0}),
        ("int", {"bits": 8, "group": None, "symmetric": True}),
        ("int", {"bits": 8, "least_zero": 0}),
        ("int", {"bits": 4, "symmetric": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", exhaustive_but(["llama", "gemma2"], "llama"))
def test_compressed_tensors(
    method: str, options: dict[str, Any], family: str, tmp_path: Path
) -> None:
    entries = {"sliding_window": 4} if family == "gemma2" else {}
    check(checkpoint(tmp_path, method, family, options=options, **entries))


@pytest.mark.slow
def test_what_a_config_says_of_activations_is_said_to_be_left_out(tmp_path: Path) -> None:
    group = {
        "targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"},
        "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"},
    }  # fmt: skip
    written = checkpoint(
        tmp_path, "int", options={"bits": 8, "group": None, "symmetric": True},
        config={"config_groups": {"group_0": group}, "kv_cache_scheme": {"num_bits": 8}},
    )  # fmt: skip
    notes = [what for _, what in check(written).notes]
    assert any("says that activations are rounded, which they are not here" in n for n in notes)
    assert any("says that keys and values are rounded" in note for note in notes)


FLOAT8: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
    # Blocks that do not come out even, as the last ones of a matrix.
    "blocks": (
        {"quant_method": "fp8", "weight_block_size": [32, 20]}, "weight_scale_inv", (32, 20),
    ),
    "one scale": ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", ()),
    "channels": ({"quant_method": "fbgemm_fp8"}, "weight_scale", (1, 0)),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}},
        "weight_scale", (1, 0),
    ),
    "compressed-tensors, blocks": (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 8, "type": "float", "strategy": "block", "block_structure": "32x20"}}}},
        "weight_scale", (32, 20),
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", mostly_slow(list(FLOAT8), ("blocks",)))
def test_fp8_weights_are_their_values_in_the_dtype_of_the_config(
    label: str, tmp_path: Path
) -> None:
    config, scale_name, block = FLOAT8[label]
    generator = torch.Generator().manual_seed(2)

    def quantise(module: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor] | None:
        if not linears(module):
            return None
        weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        sizes = [size if b == 0 else b for size, b in zip(shape, block or shape, strict=True)]
        counts = [-(-size // b) for size, b in zip(shape, sizes, strict=True)]
        scales = torch.rand(counts, generator=generator) * 0.2
        value = torch.empty(shape, dtype=torch.float64)
        for row in range(shape[0]):
            for column in range(shape[1]):
                scale = scales[row // sizes[0], column // sizes[1]].double()
                value[row, column] = weight[row, column].double() * scale
        stored = scales if block else scales.view(())
        parts = {"weight": weight, scale_name: stored, "input_scale": torch.ones(1)}
        return parts, value.to(torch.bfloat16)

    config = {"quantization_config": config, "dtype": "bfloat16"}
    program = check(write(tmp_path, "llama", quantise, config), packed=False)
    assert any("fp8 weights are read as bf16 values" in what for _, what in program.notes)
    weight = program.weights["model.layers.0.mlp.up_proj.weight"]
    assert weight.producer.load_rows(33, 48).equal(weight.load()[33:48])


@pytest.mark.slow
def test_experts_are_stacked_dense_with_a_note(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    values: dict[str, Tensor] = {}

    def quantise(module: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor] | None:
        if not linears(module) and "experts" not in module:
            return None
        matrix = Quantised.random((shape[0], shape[1]), generator)
        values[module] = matrix.value()
        return formats.gptq(matrix), matrix.value()

    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": False}}
    written = write(tmp_path, "mixtral", quantise, config, num_local_experts=2)
    assert any("experts" in module for module in values)
    program = capture(str(written.folder))
    notes = [what for _, what in program.notes]
    assert any("packed weights in stacks of experts are read as dense values" in n for n in notes)
    packed = {weight.name for weight in program.weights if weight.encoding is not None}
    assert len(packed) == 8 and not any("experts" in name for name in packed)
    first = "model.layers.0.block_sparse_moe.experts.1.w2"
    down = next(w for w in program.weights if "layers.0" in w.name and "down" in w.name)
    assert down.load()[1].equal(values[first])


@pytest.mark.slow
def test_every_form_is_emitted_of_a_quantised_checkpoint(tmp_path: Path) -> None:
    """The exact passes and the emitters run on packed weights; a GPTQ model leaves as another."""
    written = checkpoint(tmp_path, "gptq", options={"symmetric": True})
    program = capture(str(written.folder))
    expected = Runner(program).logits(INPUTS)
    go.compile_model(
        str(written.folder), tmp_path / "out", go.CompileOptions(emit=("torch", "onnx"))
    )
    for backend in ("torch", "onnx"):
        logits = open_language_model(str(tmp_path / "out"), backend).logits(*INPUTS.values())
        # ONNX Runtime multiplies codes by scales in fp32, where the value is rounded to fp16.
        assert torch.allclose(logits, expected, atol=2e-3, rtol=2e-3), backend
    go.compile_model(str(written.folder), tmp_path / "hf", go.CompileOptions(emit=("hf",)))
    config = json.loads((tmp_path / "hf/hf/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    again = capture(str(tmp_path / "hf/hf"))
    assert Runner(again).logits(INPUTS).equal(expected)
    assert {w.encoding for w in again.weights} == {w.encoding for w in program.weights}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, "the GPTQ format 'marlin', which is not"),
    "5 bits": ("gptq", {"bits": 5}, "states GPTQ with 5 bits"),
    "zeros of 3 bits": ("gptq", {"bits": 3}, "states zero points of 3 bits"),
    "bits of others": ("gptq", {"bits": 8}, "do not fit together and what"),
    "not symmetric": ("gptq", {"sym": True}, ""),
    "gemv": ("awq", {"version": "gemv"}, "states AWQ in the version 'gemv'"),
    "without zeros": ("awq", {"zero_point": False}, "states AWQ without zero points"),
    "nvfp4": ("pack", {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
    "transforms": ("pack", {"transform_config": {"config_groups": {"R1": {}}}}, "transforms of"),
    "sparse": ("pack", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
    "not compressed": ("pack", {"quantization_status": "frozen"}, "in the state 'frozen'"),
    "a wrong type": ("gptq", {"bits": "four"}, "bits"),
}  # fmt: skip


@pytest.mark.parametrize("label", REFUSED)
def test_forms_that_are_not_read_are_named(label: str, tmp_path: Path) -> None:
    method, config, message = REFUSED[label]
    written = checkpoint(tmp_path, method, config=config, num_hidden_layers=1)
    if label == "not symmetric":  # which the zero points say, when they are read
        source = open_model(str(written.folder))
        with pytest.raises(SourceError, match="are not all 8, which they are where codes are sym"):
            source.producers["model.layers.0.mlp.up_proj.weight"].load()
        return
    with pytest.raises(SourceError, match=message) as refusal:
        open_model(str(written.folder))
    assert refusal.value.remedy


DAMAGES = (
    lambda part: part[:0],
    lambda part: part[:-1],
    lambda part: part.flatten(),
    lambda part: part[None],
    lambda part: part.double(),
    lambda part: part.to(torch.int64),
    lambda part: part.to(torch.int16),
    lambda part: part.new_zeros(()),
)  # fmt: skip


@pytest.mark.parametrize("method", ["gptq", "awq", "pack", "int"])
def test_damaged_parts_are_refused_in_a_sentence(method: str, tmp_path: Path) -> None:
    """Whatever shape or type a part has: there is a sentence, or the weight has the right shape."""
    written = checkpoint(
        tmp_path, method, num_hidden_layers=1, options={"bits": 8 if method == "int" else 4}
    )
    module = "model.layers.0.mlp.up_proj"
    path = written.folder / "model.safetensors"
    tensors = load_file(path)
    config = json.loads((written.folder / "config.json").read_text())["quantization_config"]
    stated = {"gptq": Gptq, "awq": Awq}.get(method, CompressedTensors).of("config", config)
    parts = {name: value for name, value in tensors.items() if name.startswith(f"{module}.")}
    refused = 0
    for name in parts:
        for damage in DAMAGES:
            held = {n: Array(v) for n, v in (parts | {name: damage(parts[name])}).items()}
            try:
                weight = stated.read(held, torch.float16).tensors[f"{module}.weight"]
                assert weight.shape == (48, 32) and weight.load().shape == (48, 32)
            except SourceError as error:
                refused += 1
                assert "up_proj" in error.message and error.remedy
    assert refused > 2 * len(parts)


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    written = checkpoint(tmp_path, "gptq", num_hidden_layers=1)
    tensors = load_file(written.folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    from safetensors.torch import save_file

    save_file(tensors, written.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"layers\.0\.mlp\.up_proj' has no 'scales'"):
        open_model(str(written.folder))


def test_what_autogptq_and_autoawq_state_in_files_of_their_own(tmp_path: Path) -> None:
    for method, name, stated in (
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 16, "sym": False}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 16, "version": "GEMM"}),
    ):
        written = checkpoint(tmp_path / method, method, num_hidden_layers=1)
        path = written.folder / "config.json"
        config = json.loads(path.read_text())
        del config["quantization_config"]
        path.write_text(json.dumps(config))
        (written.folder / name).write_text(json.dumps(stated))
        producer = open_model(str(written.folder)).producers["model.layers.0.mlp.up_proj.weight"]
        assert producer.load().equal(written.values["model.layers.0.mlp.up_proj.weight"])
