"""GGUF files that are written: as llama.cpp's converter would, and read back as the same model.

What other packages make of them is compared too: the gguf package and transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import vocabularies
from families import mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import exhaustive_but
from tiny_models import GGUF_ARCHITECTURES, byte_tokenizer, gguf_tensors, save_tiny
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import graphopt as go
from graphopt.capture import capture
from graphopt.errors import LoweringError, SourceError, UsageError
from graphopt.execute.interpreter import Runner
from graphopt.ir import Array, Dequantised, Packed, Program
from graphopt.ir.blocks import find_blocks, remove_blocks
from graphopt.lowering import get_emitter
from graphopt.lowering.emission import Emission
from graphopt.lowering.gguf.blocks import Stored, held_by_fp16, type_of_codes
from graphopt.lowering.gguf.vocabulary import written_vocabulary
from graphopt.sources.gguf.container import read_gguf
from graphopt.sources.gguf.tokenizer import tokenizer_files
from graphopt.sources.gguf.vocabulary import read_vocabulary
from graphopt.sources.tokenizer import read_tokenizer
from graphopt.storage.artifact import load_program
from graphopt.support.progress import silent

INPUTS = {
    "input_ids": torch.tensor([[5, 3, 9, 2, 11, 7], [1, 6, 7, 8, 4, 2]]),
    "attention_mask": torch.ones(2, 6, dtype=torch.int64),
}

Q4_0, Q4_1, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))


def program_of(folder: Path, family: str = "llama", **entries: Any) -> Program:
    save_tiny(folder / "m", family, **entries)
    program, _ = go.Pipeline.default().run(capture(str(folder / "m")), go.RunOptions(verify=False))
    return program


def emitted(program: Program, folder: Path, **options: Any) -> tuple[Path, dict[str, str]]:
    """Emit; return the file and the notes."""
    report = go.emit(program, folder, emit=("gguf",), **options)
    assert report.artifact is not None
    notes = {note.where: note.reason for note in report.artifact.notes}
    return folder / "gguf/model.gguf", notes


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", mostly_slow(list(GGUF_ARCHITECTURES), ("llama",), ("gemma2", "qwen2", "qwen3"))
)
def test_a_file_is_what_llama_cpps_converter_writes_and_reads_back_equal(
    family: str, tmp_path: Path
) -> None:
    architecture, entries = GGUF_ARCHITECTURES[family]
    program = program_of(tmp_path, family, **entries)
    path, notes = emitted(program, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert not notes
    # By the names and the layout of the format, which the package knows too.
    wanted = gguf_tensors(model, architecture)
    reader = gguf.GGUFReader(path)
    held = {tensor.name: tensor for tensor in reader.tensors}
    assert set(held) == set(wanted)
    for name, value in wanted.items():
        assert np.array_equal(held[name].data, value), name
    assert reader.fields["general.architecture"].contents() == gguf.MODEL_ARCH_NAMES[architecture]
    # By graphopt's own reader, which checks every key and the tokenizer.
    opened = capture(str(path))
    expected = Runner(program).logits(INPUTS)
    assert Runner(opened).logits(INPUTS).equal(expected)
    assert Runner(load_program(tmp_path / "out")).logits(INPUTS).equal(expected)
    tokenizer = read_tokenizer(Path(opened.tokenizer or ""))
    text = "the theatre, 12 times\n"
    assert tokenizer(text)["input_ids"] == byte_tokenizer()(text)["input_ids"]
    # By transformers, which undoes what the converter does.
    theirs = load_gguf_checkpoint(  # type: ignore[no-untyped-call]
        str(path), return_tensors=True, model_to_load=model
    )["tensors"]
    state = model.state_dict()
    for name, tensor in theirs.items():
        # Gemma's gains went through `+ 1`, which rounds once at a size of about 1.
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1.3e-7, msg=name)


SCALINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}),
    "yarn": ("qwen2", {"rope_type": "yarn", "factor": 4.0,
                       "original_max_position_embeddings": 32}),
    "llama3": ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    "longrope": ("phi3", {"rope_type": "longrope", "long_factor": [1.1, 2.3, 4.7, 9.0],
                          "short_factor": [1.0, 1.2, 1.5, 2.0],
                          "original_max_position_embeddings": 64}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("label", exhaustive_but(SCALINGS, "yarn", "llama3"))
def test_scalings_of_positions(label: str, tmp_path: Path) -> None:
    family, scaling = SCALINGS[label]
    theta = 5e5 if label == "llama3" else 1e4
    entries = {"rope_parameters": scaling | {"rope_theta": theta}, "max_position_embeddings": 16384}
    if label == "llama3":  # whose divisors reach the factor at low frequencies
        entries["head_dim"] = 16
    if family == "phi3":
        entries |= {"head_dim": None, "pad_token_id": 0, "max_position_embeddings": 128,
                    "original_max_position_embeddings": 64}  # fmt: skip
    program = program_of(tmp_path, family, **entries)
    path, _ = emitted(program, tmp_path / "out")
    expected = Runner(program).logits(INPUTS)
    # Numbers of a file are fp32, where the config's are fp64.
    torch.testing.assert_close(
        Runner(capture(str(path))).logits(INPUTS), expected, rtol=0, atol=1e-5
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from([(4, True, Q4_0), (4, False, Q4_1), (8, True, Q8_0)]),
    st.sampled_from([32, 64]),
    st.integers(0, 99),
)
def test_packed_weights_are_blocks_bit_for_bit(form, group, seed):
    """By the gguf package, which shares nothing with what wrote them."""
    bits, symmetric, kind = form
    generator = torch.Generator().manual_seed(seed)
    encoding = Packed(bits, group, symmetric=symmetric)
    codes = torch.randint(0, 2**bits, (6, 128), generator=generator)
    # A zero point times such a scale has as many bits as fp16 holds.
    scales = torch.randint(1, 64, (6, 128 // group), generator=generator) / 1024
    zeros = torch.randint(0, 2**bits, scales.shape, generator=generator)
    tensors = encoding.pack(codes, scales, None if symmetric else zeros)
    weight = Dequantised(encoding, **{s: Array(t) for s, t in tensors.items()})
    assert type_of_codes(weight) == kind and held_by_fp16(weight)
    (data,) = Stored(weight, kind, exact=True).pieces("w")
    value = gguf.dequantize(data.reshape(6, -1), kind)
    assert np.array_equal(value, weight.load().numpy())


def pack(program: Program, encoding: Packed, scale: torch.dtype = torch.float16) -> Program:
    """Return a copy in which projections are packed, scales rounded to a dtype."""
    result = program.copy()
    for weight in program.weights:
        if "_proj.weight" in weight.name and weight.shape[1] % encoding.group == 0:
            tensors = encoding.quantise(weight.load(), scale)
            tensors["scales"] = tensors["scales"].float()
            producer = Dequantised(encoding, **{s: Array(t) for s, t in tensors.items()})
            result.weights.replace(weight.with_producer(producer))
    return result


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = tmp_path_factory.mktemp("llama")
    return program_of(folder, tie_word_embeddings=False, intermediate_size=64)


def types(path: Path) -> dict[str, str]:
    return {name: tensor.ggml_type.name for name, tensor in read_gguf(path).tensors.items()}


@pytest.mark.slow
def test_codes_go_out_as_they_are_where_blocks_hold_them(llama: Program, tmp_path: Path) -> None:
    """Queries and keys too, whose rows llama.cpp has in another order."""
    for encoding, kind in ((Packed(4, 32), "Q4_0"), (Packed(8, 32), "Q8_0")):
        program = pack(llama, encoding)
        path, notes = emitted(program, tmp_path / kind)
        assert not notes
        held = types(path)
        assert {held[name] for name in held if ".attn_" in name and "norm" not in name} == {kind}
        assert held["token_embd.weight"] == "F32" and held["output_norm.weight"] == "F32"
        assert Runner(capture(str(path))).logits(INPUTS).equal(Runner(program).logits(INPUTS))


@pytest.mark.slow
def test_other_codes_are_numbers_with_the_reason_or_rounded_if_asked(
    llama: Program, tmp_path: Path
) -> None:
    cases = {
        "groups are of 16": pack(llama, Packed(4, 16)),
        "fp16 does not hold its scales": pack(llama, Packed(4, 32), torch.float32),
        "no type of 8 bits with zero points": pack(llama, Packed(8, 32, symmetric=False)),
        "no type of 2 bits": pack(llama, Packed(2, 32)),
    }
    for number, (reason, program) in enumerate(cases.items()):
        path, notes = emitted(program, tmp_path / str(number))
        assert any(reason in note and "--gguf-type" in note for note in notes.values()), reason
        assert set(types(path).values()) == {"F32"}
        assert Runner(capture(str(path))).logits(INPUTS).equal(Runner(program).logits(INPUTS))
    path, _ = emitted(cases["groups are of 16"], tmp_path / "rounded", gguf_type="q8_0")
    assert types(path)["blk.0.ffn_up.weight"] == "Q8_0"
    # Codes that GPTQ chose, say, are kept where only the scales have to be rounded.
    program = cases["fp16 does not hold its scales"]
    path, notes = emitted(program, tmp_path / "scales", gguf_type="q4_0")
    assert "its scales are rounded to fp16" in notes.values()
    weight = program.weights["model.layers.0.mlp.up_proj.weight"].producer
    tensors = {name: part.load() for name, part in weight.tensors().items()}
    rounded = weight.encoding.dequantise(tensors | {"scales": tensors["scales"].half().float()})
    held = read_gguf(path).tensors["blk.0.ffn_up.weight"]
    assert held.load().equal(rounded)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_matrices_are_rounded_to_the_type_that_is_asked_for(
    name: str, llama: Program, tmp_path: Path
) -> None:
    path, notes = emitted(llama, tmp_path / "out", gguf_type=name)
    assert not [where for where in notes if where != "weights"]
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) < 2:
            assert tensor.tensor_type.name == "F32"
            continue
        ends = tensor.name in ("token_embd.weight", "output.weight") and name.startswith("q")
        assert tensor.tensor_type.name == ("Q8_0" if ends else name.upper())
    weight = llama.weights["model.layers.0.mlp.up_proj.weight"].load().numpy()
    kind = gguf.GGMLQuantizationType[name.upper()]
    wanted = gguf.dequantize(gguf.quants.quantize(weight, kind), kind)
    held = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    assert np.array_equal(gguf.dequantize(held.data, held.tensor_type), wanted)
    manifest = json.loads((tmp_path / "out/report.json").read_text())
    assert manifest["artifact"]["forms"][0]["dtype"] == name


def test_what_the_folder_holds_beside_the_file_is_planned_for(
    llama: Program, tmp_path: Path
) -> None:
    """The folder is a program too: numbers that the file has as blocks lie beside it again."""
    planned = Emission.of("cpu", ("gguf",), False, False, gguf_type="q4_0").sizes(llama)
    form, rest = planned
    report = go.emit(llama, tmp_path / "out", emit=("gguf",), gguf_type="q4_0")
    assert report.artifact is not None and report.artifact.forms[1] == rest
    size = (tmp_path / "out/model.safetensors").stat().st_size
    header = 200 * len(llama.weights)
    assert (rest.name, rest.dtype) == ("program", "f32")
    assert rest.bytes <= size < rest.bytes + header
    assert form.bytes < rest.bytes / 2
    both = Emission.of("cpu", ("gguf", "torch"), False, False, gguf_type="q4_0").sizes(llama)
    assert [each.name for each in both] == ["gguf", "torch"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gguf", "hf", "torch", "onnx"])
def test_what_a_form_keeps_of_a_program_is_what_it_says_where_it_is(
    name: str, llama: Program, tmp_path: Path
) -> None:
    for number, program in enumerate((llama, pack(llama, Packed(4, 16, symmetric=False)))):
        emitter = get_emitter(name)
        emitter.check(program, "cpu")
        kept = emitter.kept(program, "cpu")
        storage = emitter.emit(program, tmp_path / str(number), "cpu", silent).storage
        matrices = {weight.tensors()[0].name for weight in program.weights
                    if not weight.constant and len(weight.shape) > 1}  # fmt: skip
        assert kept & matrices == set(storage) & matrices


def test_the_type_of_a_file_is_that_of_what_is_in_it(llama: Program, tmp_path: Path) -> None:
    """Whether fp16 holds scales, or their products with zero points, only their values say."""
    emission = Emission.of("cpu", ("gguf",), False, False)
    asymmetric = pack(llama, Packed(4, 32, symmetric=False))
    assert emission.sizes(asymmetric)[0].dtype == "f32"
    wide = pack(llama, Packed(4, 32), torch.float32)
    assert emission.sizes(wide)[0].dtype == "q4_0"
    report = go.emit(wide, tmp_path / "out", emit=("gguf",))
    assert report.artifact is not None and report.artifact.forms[0].dtype == "f32"
    names = {tensor.name for tensor in wide.weights.tensors()}
    assert set(json.loads((tmp_path / "out/program.json").read_text())["storage"]) == names


def test_codes_with_scales_of_16_bits_are_stored_where_they_are(
    llama: Program, tmp_path: Path
) -> None:
    """Their values in the file are no weight of the program."""
    program = llama.copy()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = Packed(4, 16).quantise(llama.weights[name].load(), torch.float16)
    producer = Dequantised(Packed(4, 16), **{s: Array(t) for s, t in tensors.items()})
    program.weights.replace(llama.weights[name].with_producer(producer))
    emitted(program, tmp_path / "out")
    storage = json.loads((tmp_path / "out/program.json").read_text())["storage"]
    assert name not in storage and storage[f"{name}.packed"]["file"] == "model.safetensors"
    assert load_program(tmp_path / "out").weights[name].load().equal(program.weights[name].load())


def test_codes_that_are_blocks_already_are_not_rounded_again(
    llama: Program, tmp_path: Path
) -> None:
    program = pack(llama, Packed(4, 16))
    ends = {"model.embed_tokens.weight": Packed(8, 32), "lm_head.weight": Packed(4, 32)}
    for name, encoding in ends.items():
        tensors = encoding.quantise(llama.weights[name].load(), torch.float16)
        tensors["scales"] = tensors["scales"].float()
        producer = Dequantised(encoding, **{s: Array(t) for s, t in tensors.items()})
        program.weights.replace(llama.weights[name].with_producer(producer))
    path, notes = emitted(program, tmp_path / "out", gguf_type="q4_0")
    tensors = read_gguf(path).tensors
    for name, held, kind in (
        ("model.embed_tokens.weight", "token_embd.weight", "Q8_0"),
        ("lm_head.weight", "output.weight", "Q4_0"),
    ):
        assert tensors[held].ggml_type.name == kind
        assert tensors[held].load().equal(program.weights[name].load())
    (reason,) = [note for where, note in notes.items() if where.startswith("blk.")]
    assert reason.startswith("its codes are rounded a second time: its groups are of 16 codes")


def test_minima_beyond_fp16_are_refused() -> None:
    encoding = Packed(4, 32, symmetric=False)
    tensors = encoding.pack(
        torch.zeros(2, 32), torch.full((2, 1), 3e4), torch.full((2, 1), 15.0)
    )  # fmt: skip
    weight = Dequantised(encoding, **{s: Array(t) for s, t in tensors.items()})
    with pytest.raises(SourceError, match="minima in fp16"):
        list(Stored(weight, Q4_1, exact=True).pieces("w"))


def test_a_refusal_names_forms_that_there_are(llama: Program) -> None:
    changed = pack(llama, Packed(4, 32))
    for node in next(f for f in changed.functions.values() if f.name == "block").nodes:
        if node.op == "silu":
            node.op = "relu"
    with pytest.raises(LoweringError) as caught:
        go.emit(changed, "nowhere", emit=("gguf",))
    assert caught.value.remedy == "Emit torch or onnx instead (--emit torch,onnx)."
    changed = pack(changed, Packed(3, 32))
    for form in ("gguf", "hf"):
        with pytest.raises(LoweringError) as caught:
            go.emit(changed, "nowhere", emit=(form,))
        assert caught.value.remedy == "Emit torch instead (--emit torch)."


@pytest.mark.slow
def test_rows_that_are_no_blocks_stay_numbers(tmp_path: Path) -> None:
    program = program_of(tmp_path)  # whose feed-forward parts have 48 neurons
    path, notes = emitted(program, tmp_path / "out", gguf_type="q4_0")
    assert types(path)["blk.0.ffn_down.weight"] == "F32"
    assert types(path)["blk.0.ffn_up.weight"] == "Q4_0"
    assert "rows of 48 are no blocks of 32" in notes["blk.0.ffn_down.weight and 1 more"]


@pytest.mark.slow
def test_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "mistral")
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config))
    program = capture(str(folder))
    path, _ = emitted(program, tmp_path / "out")
    assert read_gguf(path).architecture == "llama"
    assert Runner(capture(str(path))).logits(INPUTS).equal(Runner(program).logits(INPUTS))


def refused(program: Program) -> str:
    with pytest.raises(LoweringError) as caught:
        go.emit(program, "nowhere", emit=("gguf",))
    assert caught.value.remedy
    return caught.value.message


@pytest.mark.slow
def test_refusals(llama: Program, tmp_path: Path) -> None:
    opt = program_of(tmp_path / "opt", "opt", ffn_dim=64, word_embed_proj_dim=32)
    assert "of type 'opt', and what is written for llama.cpp is of the types gemma2" in refused(opt)
    window = program_of(tmp_path / "mistral", "mistral", sliding_window=8)
    assert "has a window, and llama.cpp's llama has none" in refused(window)
    gemma = program_of(
        tmp_path / "gemma2", "gemma2", sliding_window=8, query_pre_attn_scalar=24,
        num_hidden_layers=4,
    )  # fmt: skip
    assert "as llama.cpp's gemma2 it would be another model" in refused(gemma)
    pruned = gemma.copy()
    remove_blocks(pruned, [0])
    assert len(find_blocks(pruned)) == 3
    assert "gives every layer but each second a window" in refused(pruned)
    changed = llama.copy()
    for node in next(f for f in changed.functions.values() if f.name == "block").nodes:
        if node.op == "silu":
            node.op = "relu"
    assert "not silu(" in refused(changed)
    with pytest.raises(UsageError, match="is for the GGUF form"):
        go.emit(llama, tmp_path / "x", emit=("torch",), gguf_type="q8_0")
    with pytest.raises(UsageError, match="q4_k"):
        go.emit(llama, tmp_path / "x", emit=("gguf",), gguf_type="q4_k")


@pytest.mark.parametrize("name", ["scored", "scored, no space", "ranked", "ranked, qwen2"])
def test_vocabularies_come_back(name: str, tmp_path: Path) -> None:
    """A tokenizer made of a vocabulary gives a vocabulary that encodes alike."""
    entries = vocabularies.scored() if "scored" in name else vocabularies.ranked()
    changes: dict[str, Any] = {
        "scored, no space": {"add_space_prefix": False}, "ranked, qwen2": {"pre": "qwen2"},
    }.get(name, {})  # fmt: skip
    first = read_vocabulary(vocabularies.file_of(entries, **changes))
    assert first is not None
    for file, text in tokenizer_files(first).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    rows = len(first.tokens) + 3
    written = written_vocabulary(tmp_path, "llama", rows, (2, 3))
    second = written.vocabulary
    assert second.model == first.model and second.tokens[: rows - 3] == first.tokens
    assert second.tokens[rows - 3 :] == tuple(f"[PAD{n}]" for n in range(rows - 3, rows))
    assert second.splitting == first.splitting and second.space_prefix == first.space_prefix
    assert second.special == first.special and second.ends == [2, 3]
    # What is written is read as what was meant.
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in written.keys().items()}
    keys.pop("tokenizer.chat_template", None)
    again = read_vocabulary(vocabularies.file_of(keys))
    assert again is not None and again.merges == second.merges and again.scores == second.scores
