"""Checkpoints with packed weights, as compressed-tensors has them.

What the package itself makes of them is tested where it is installed; the extra `test` brings it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from families import captured, mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import save_tiny

import graphopt as go
from graphopt.capture import capture
from graphopt.errors import LoweringError
from graphopt.execute.interpreter import Runner
from graphopt.ir import Array, Dequantised, Packed, Program, Weight
from graphopt.ir.functional import unpack
from graphopt.ir.verify import verify
from graphopt.ir.weights import Missing, Rows
from graphopt.lowering.hf import HfEmitter
from graphopt.lowering.hf.checkpoint_assembly import Fragment, assemble
from graphopt.lowering.hf.pack_quantized import PackedWords, PackedZeroPoints, pack_quantized
from graphopt.storage.artifact import load_program

FOUR = Packed(4, 16)
INPUTS = {
    "input_ids": torch.tensor([[5, 3, 9, 2, 11, 7], [1, 6, 7, 8, 4, 2]]),
    "attention_mask": torch.ones(2, 6, dtype=torch.int64),
}

ENCODINGS = st.builds(
    Packed, bits=st.sampled_from((2, 3, 4, 8)), group=st.integers(1, 12), symmetric=st.booleans()
)


def packed(weight: Weight, encoding: Packed, scale: torch.dtype = torch.float32) -> Weight:
    tensors = encoding.quantise(weight.load(), scale)
    producer = Dequantised(encoding, **{s: Array(t) for s, t in tensors.items()})
    return weight.with_producer(producer)


def with_packed(program: Program, choose) -> Program:
    """Return a copy whose matrices are packed as `choose(name)` says, None for dense."""
    result = program.copy()
    for weight in program.weights:
        encoding = choose(weight.name) if len(weight.shape) == 2 and not weight.constant else None
        if encoding is not None:
            result.weights.replace(packed(weight, encoding))
    verify(result)
    return result


def projections(encoding: Packed):
    return lambda name: encoding if re.search(r"_proj\.|\.fc\d\.", name) else None


def bit_by_bit(words: list[int], bits: int, count: int) -> list[int]:
    """Return codes of a row of int32 words, which are read as one whole number."""
    number = sum((word % 2**32) << (32 * index) for index, word in enumerate(words))
    return [(number >> (bits * index)) % 2**bits for index in range(count)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ENCODINGS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_words_hold_the_codes_of_rows_and_the_zero_points_of_columns(encoding, rows, groups, seed):
    """Element by element, by the format's definition."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, groups * encoding.group, generator=generator)
    tensors = encoding.quantise(matrix)
    weight = Dequantised(encoding, **{s: Array(t) for s, t in tensors.items()})
    codes = unpack(tensors["packed"], encoding.bits)[..., : encoding.group].flatten(1)
    words = PackedWords(weight)
    assert words.load().shape == words.shape and words.load().dtype == words.dtype
    for row, values in zip(codes.tolist(), words.load().tolist(), strict=True):
        assert bit_by_bit(values, encoding.bits, len(row)) == row
    assert words.load_rows(0, 1).equal(words.load()[:1])
    if not encoding.symmetric:
        points = PackedZeroPoints(weight)
        wanted = unpack(tensors["zeros"], encoding.bits)[:, :groups].t()
        assert points.load().shape == points.shape and points.load().is_contiguous()
        for column, values in zip(wanted.tolist(), points.load().t().tolist(), strict=True):
            assert bit_by_bit(values, encoding.bits, rows) == column


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = save_tiny(tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)
    program, _ = go.Pipeline.default().run(capture(str(folder)), go.RunOptions(verify=False))
    return program


MIXED = {
    "model.layers.0.self_attn.q_proj.weight": Packed(4, 16, symmetric=False),
    "model.layers.0.mlp.up_proj.weight": Packed(8, 32),
    "model.layers.1.mlp.down_proj.weight": Packed(4, 16, axis=0),
    "model.embed_tokens.weight": Packed(4, 32),
}


def written(program: Program, folder: Path):
    """Emit; return config.json's entry, the tensors and the notes."""
    report = go.emit(program, folder, emit=("hf",))
    assert report.artifact is not None
    config = json.loads((folder / "hf/config.json").read_text())
    notes = {note.where: note.reason for note in report.artifact.notes}
    return config.get("quantization_config"), load_file(folder / "hf/model.safetensors"), notes


def test_a_uniform_model_is_one_scheme(llama, tmp_path):
    config, tensors, notes = written(with_packed(llama, projections(FOUR)), tmp_path / "out")
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    (scheme,) = config["config_groups"].values()
    assert scheme["targets"] == ["Linear"] and config["ignore"] == ["lm_head"]
    assert scheme["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16,
        "dynamic": False,
    }  # fmt: skip
    layer = "model.layers.0.mlp.down_proj"
    assert f"{layer}.weight" not in tensors and not notes
    assert tensors[f"{layer}.weight_packed"].shape == (32, 6)
    assert tensors[f"{layer}.weight_packed"].dtype == torch.int32
    assert tensors[f"{layer}.weight_scale"].shape == (32, 3)
    assert tensors[f"{layer}.weight_shape"].tolist() == [32, 48]


def test_what_the_format_cannot_hold_is_written_dense_with_the_reason(llama, tmp_path):
    program = with_packed(llama, MIXED.get)
    config, tensors, notes = written(program, tmp_path / "out")
    schemes = {tuple(g["targets"]): g["weights"] for g in config["config_groups"].values()}
    assert schemes["model.layers.0.self_attn.q_proj",]["symmetric"] is False
    assert schemes["model.layers.0.mlp.up_proj",]["strategy"] == "channel"
    assert "model.layers.0.self_attn.k_proj" in config["ignore"]
    assert "of class Embedding" in notes["model.embed_tokens.weight"]
    assert "lie along axis 0" in notes["model.layers.1.mlp.down_proj.weight"]
    assert "zero points of one encoding alone, and these layers have 2" in notes["hf"]
    alike = {name: Packed(4, 16, symmetric=False) for name in MIXED if "q_proj" in name}
    _, _, notes = written(with_packed(llama, alike.get), tmp_path / "alike")
    assert "CompressedTensorsConfig(dequantize=True)" in notes["hf"]
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        assert tensors[name].equal(program.weights[name].load())


def test_codes_are_stored_once(llama, tmp_path):
    program = with_packed(llama, projections(FOUR))
    go.emit(program, tmp_path / "out", emit=("hf",))
    opened = load_program(tmp_path / "out")
    weight = opened.weights["model.layers.0.mlp.up_proj.weight"]
    assert weight.encoding == FOUR
    assert Runner(opened).logits(INPUTS).equal(Runner(program).logits(INPUTS))
    # Beside the checkpoint there is what a checkpoint does not hold: rotary frequencies.
    assert (tmp_path / "out/model.safetensors").stat().st_size < 200


@pytest.mark.slow
def test_refusals(llama, tmp_path):
    tied = with_packed(captured("gpt2")[1], lambda name: FOUR)
    tied.config = captured("gpt2")[0].config.to_dict()
    with pytest.raises(LoweringError, match=r"none of its packed weights.*of class (Conv1D|Emb)"):
        HfEmitter().check(tied, "cpu")
    rounded = with_packed(llama, projections(FOUR))
    (name,) = {call.function for call in rounded.calls if call.path}
    function = rounded.functions[name]
    node = next(n for n in function.nodes if n.op == "linear")
    new = function.add(
        "quantise_dequantise", [node.inputs[0]], {"bits": 4, "symmetric": True}, before=node
    )
    node.inputs[0] = new.output
    verify(rounded)
    with pytest.raises(LoweringError, match="no activations rounded at run time"):
        HfEmitter().check(rounded, "cpu")


def test_parts_of_a_fused_projection_that_are_stored_unlike_are_dense_in_a_dtype_of_all() -> None:
    """fp16 holds no values of bf16's range, and bf16 none of fp16's precision."""
    values = [torch.tensor([[1 + 2**-10, 2.0]]).half(), torch.tensor([[2.0**100, 1.0]]).bfloat16()]
    whole = Missing("w", (2, 2), torch.float32)
    codes = Packed(4, 2)
    first = Dequantised(codes, **{s: Array(t) for s, t in codes.quantise(values[0]).items()})
    fragments = [
        Fragment((Rows(whole, slice(row, row + 1)),), producer)
        for row, producer in enumerate((first, Array(values[1])))
    ]
    made = assemble((2, 2), fragments)
    assert made.dtype == torch.float32
    assert made.load().equal(torch.cat([first.load().float(), values[1].float()]))
    assert made.encodings == [codes]
    module = torch.nn.ModuleDict({"p": torch.nn.Linear(2, 2)})
    checkpoint = pack_quantized({"p.weight": made}, module)
    assert checkpoint.tensors == {"p.weight": made} and checkpoint.config is None
    ((where, note),) = checkpoint.notes()
    assert where == "p.weight" and "not packed alike" in note


@pytest.mark.slow
def test_experts_beside_packed_layers_are_refused(tmp_path):
    program = capture(str(save_tiny(tmp_path / "m", "mixtral", num_local_experts=2)))
    with pytest.raises(LoweringError, match="takes all experts of a checkpoint with packed"):
        HfEmitter().check(with_packed(program, projections(FOUR)), "cpu")


LOADED = {
    "llama": (FOUR, {}),
    "qwen2": (Packed(8, 32), {"intermediate_size": 64}),
    "phi3": (Packed(4, 8), {"head_dim": None, "pad_token_id": 0}),
    "gemma3_text": (Packed(4, 16), {"sliding_window": 4}),
    "qwen3": (Packed(4, 16, symmetric=False), {"head_dim": 16}),
    "opt": (Packed(8, 16), {"ffn_dim": 64, "word_embed_proj_dim": 32}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", mostly_slow(list(LOADED), ("llama",), ("qwen2", "opt", "gemma3_text"))
)
def test_transformers_loads_what_is_written_with_compressed_tensors(family, tmp_path):
    """The package unpacks the codes bit for bit, and the logits are those of the dense values."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    encoding, entries = LOADED[family]
    program = capture(str(save_tiny(tmp_path / "m", family, **entries)))
    program, _ = go.Pipeline.default().run(program, go.RunOptions(verify=False))
    program = with_packed(program, projections(encoding))
    _, tensors, _ = written(program, tmp_path / "out")
    layers = [name.removesuffix("_packed") for name in tensors if name.endswith("weight_packed")]
    assert len(layers) >= 8
    for layer in layers:
        shape = torch.Size(tensors[f"{layer}_shape"])
        signed = unpack_from_int32(tensors[f"{layer}_packed"], encoding.bits, shape)
        groups = shape[1] // encoding.group
        zeros = torch.zeros(shape[0], groups, dtype=torch.int8)
        if not encoding.symmetric:
            points = tensors[f"{layer}_zero_point"]
            zeros = unpack_from_int32(
                points, encoding.bits, torch.Size([shape[0], groups]), packed_dim=0
            )
        value = (signed.double() - zeros.repeat_interleave(encoding.group, 1)) * tensors[
            f"{layer}_scale"
        ].double().repeat_interleave(encoding.group, 1)
        if layer in program.weights:  # and not cut out of a fused one
            assert value.float().equal(program.weights[layer].load())
    dense = {}
    if not encoding.symmetric:
        dense = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out/hf", dtype=torch.float32, attn_implementation="eager", **dense
    ).eval()
    with torch.no_grad():
        logits = model(**INPUTS).logits
    expected = Runner(program).logits(INPUTS)
    # The same fp32 values in the same layers: what differs is the order of sums.
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())
