"""GGUF files against the models they were made of, against transformers, and damaged."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    GGUF_ARCHITECTURES,
    VOCAB,
    byte_tokenizer,
    pairs_from_halves,
    tiny_model,
    write_gguf,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import graphopt as go
from graphopt.capture.model import attention_implementation
from graphopt.errors import SourceError
from graphopt.ir.types import DTYPE_NAMES
from graphopt.ir.weights import Array
from graphopt.sources import open_model
from graphopt.sources.base import ModelSource
from graphopt.sources.gguf.container import read_gguf
from graphopt.sources.gguf.weights import HalvesFromPairs

pytestmark = pytest.mark.oldest

LLAMA = gguf.MODEL_ARCH.LLAMA


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_model(), LLAMA, tokenizer=True)


def rebuilt(source: ModelSource) -> PreTrainedModel:
    """The model that a source describes, with its weights."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        source.config,
        dtype=torch.float32,
        attn_implementation=attention_implementation(source.config),
    )
    model.eval()  # type: ignore[no-untyped-call]
    state = {name: producer.load() for name, producer in source.producers.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@pytest.mark.parametrize("model_type", GGUF_ARCHITECTURES)
def test_file_gives_back_the_model_it_was_made_of(tmp_path: Path, model_type: str) -> None:
    architecture, entries = GGUF_ARCHITECTURES[model_type]
    model = tiny_model(model_type, **entries)
    source = open_model(str(write_gguf(tmp_path / "m.gguf", model, architecture)))
    assert source.kind == "gguf" and source.tokenizer is None
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert set(source.producers) == set(state)
    for name, tensor in state.items():
        loaded = source.producers[name].load()
        assert loaded.dtype == source.producers[name].dtype == torch.float32
        # Gemma's gains went through `+ 1`, which rounds once at a size of about 1.
        torch.testing.assert_close(loaded, tensor, rtol=0, atol=1.3e-7, msg=name)
    ids = torch.randint(0, VOCAB, (2, 21))
    with torch.no_grad():
        expected, got = model(ids).logits, rebuilt(source)(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("encoding", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "BF16"])
def test_encodings_equal_the_package(tmp_path: Path, encoding: str) -> None:
    kind = gguf.GGMLQuantizationType[encoding]
    # Wide enough for whole chunks of blocks and a rest.
    model = tiny_model(hidden_size=64, intermediate_size=96, vocab_size=4500)
    path = write_gguf(tmp_path / "m.gguf", model, LLAMA, encoding=kind)
    tensors = read_gguf(path).tensors
    for stored in gguf.GGUFReader(path).tensors:
        expected = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
        tensor = tensors[stored.name]
        own = {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored.tensor_type.name)
        assert tensor.load().dtype == tensor.dtype == (own or torch.float32)
        assert torch.equal(tensor.load().float(), expected)
        assert torch.equal(tensor.load_rows(3, 11).float(), expected[3:11])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [("Q4_0", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)],
)
def test_numbers_of_16_bits_stay_so_and_codes_become_fp32(
    tmp_path: Path, encoding: str, dtype: torch.dtype
) -> None:
    model = tiny_model(hidden_size=64, intermediate_size=96)
    kind = gguf.GGMLQuantizationType[encoding]
    path = write_gguf(tmp_path / "m.gguf", model, LLAMA, encoding=kind)
    source = open_model(str(path))
    assert source.dtype == dtype
    program = go.Pipeline.default().run(go.capture(str(path)), go.RunOptions(verify=False))[0]
    report = go.emit(program, tmp_path / "out", emit=("onnx", "hf"))
    assert {form.dtype for form in report.artifact.forms} == {DTYPE_NAMES[dtype]}
    said = [note.reason for note in report.artifact.notes if note.where == "weights"]
    assert len(said) == (encoding == "Q4_0") and all("packed codes" in text for text in said)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_pieces_of_a_large_tensor_equal_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(
        tmp_path / "m.gguf", tiny_model(hidden_size=96, intermediate_size=96), LLAMA, encoding=kind
    )
    tensor = read_gguf(path).tensors["token_embd.weight"]
    whole = tensor.load_rows(0, rows)  # three blocks a row, in one piece
    monkeypatch.setattr("graphopt.sources.gguf.container._CHUNK_BLOCKS", 2)
    monkeypatch.setattr("graphopt.sources.gguf.container._CHUNKS", 2)
    assert whole.shape == (rows, 96) and torch.equal(tensor.load_rows(0, rows), whole)
    assert tensor.load_rows(2, 2).shape == (0, 96)


def test_equal_to_transformers(tmp_path: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = tiny_model(tie_word_embeddings=False, intermediate_size=64)
    path = write_gguf(tmp_path / "m.gguf", model, LLAMA, encoding=gguf.GGMLQuantizationType.Q8_0)
    theirs = load_gguf_checkpoint(  # type: ignore[no-untyped-call]
        str(path), return_tensors=True, model_to_load=model
    )["tensors"]
    producers = open_model(str(path)).producers
    assert set(producers) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(producers[name].load(), tensor), name


@given(heads=st.integers(1, 5), half=st.integers(1, 4), width=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_rotary_pairs_are_undone(heads: int, half: int, width: int) -> None:
    value = torch.randn(heads * half * 2, width)
    for tensor in (value, value[:, 0]):
        stored = Array(pairs_from_halves(tensor, heads))
        assert torch.equal(HalvesFromPairs(stored, heads).load(), tensor)


def test_llama3_frequency_scaling(tmp_path: Path) -> None:
    rope: dict[str, Any] = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    entries: dict[str, Any] = {
        "rope_parameters": rope,
        "head_dim": 16,
        "max_position_embeddings": 16384,
    }
    model = tiny_model(**entries)
    plain = rope["rope_theta"] ** (-torch.arange(0, 16, 2) / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", model, LLAMA, extra={"rope_freqs.weight": divisors})
    config = open_model(str(path)).config
    assert config is not None
    assert config.rope_parameters == rope
    divisors[1] = 7
    path = write_gguf(tmp_path / "n.gguf", model, LLAMA, extra={"rope_freqs.weight": divisors})
    with pytest.raises(SourceError, match="other than Llama 3's"):
        open_model(str(path))


def test_tokenizer_and_chat_template(llama: Path, tmp_path: Path) -> None:
    source = open_model(str(llama))
    assert source.tokenizer is not None and source.tokenizer.is_relative_to(tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer)
    assert tokenizer.eos_token == "<end>"
    assert tokenizer.decode(tokenizer("thé 日本 the\n 1")["input_ids"]) == "thé 日本 the\n 1"
    assert tokenizer("the<end>")["input_ids"] == byte_tokenizer()("the<end>")["input_ids"]
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>hi</user>"
    # The second time it comes from the cache.
    stamp = source.tokenizer.stat().st_mtime_ns
    assert open_model(str(llama)).tokenizer == source.tokenizer
    assert source.tokenizer.stat().st_mtime_ns == stamp
    assert [p.name for p in source.tokenizer.parent.iterdir()] == [source.tokenizer.name]


def test_digits_are_cut_off_before_anything_else(llama: Path) -> None:
    backend = AutoTokenizer.from_pretrained(open_model(str(llama)).tokenizer).backend_tokenizer
    pieces = [text for text, _ in backend.pre_tokenizer.pre_tokenize_str("a  12\n\n3")]
    assert pieces == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]


def test_unknown_splitting_rule(tmp_path: Path, llama: Path) -> None:
    changed = llama.read_bytes().replace(b"smollm", b"gollum")
    (tmp_path / "n.gguf").write_bytes(changed)
    with pytest.raises(SourceError, match=r"the rule 'gollum'.*Known are.*llama-bpe"):
        open_model(str(tmp_path / "n.gguf"))


def test_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match=r"'rwkv7', which is not read.*gemma2, .*qwen3"):
        open_model(str(tmp_path / "m.gguf"))


def test_tensor_without_a_place(tmp_path: Path) -> None:
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((2, 2), dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny_model(), LLAMA, extra=extra)
    with pytest.raises(SourceError, match=r"'blk\.0\.ffn_gate_inp\.weight' has no place"):
        open_model(str(path))


def test_every_truncation_is_refused(llama: Path, tmp_path: Path) -> None:
    whole = llama.read_bytes()
    header = min(tensor.offset for tensor in read_gguf(llama).tensors.values())
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 10, *range(24, header, 997), header, len(whole) - 64]:
        cut.write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"cut\.gguf (is|holds)"):
            read_gguf(cut)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_damage_never_shows_as_another_error(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    path = write_gguf(folder / "m.gguf", shared_model(), LLAMA, tokenizer=True)
    header = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    data = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    for place in random.integers(0, header, size=3):
        data[place] = random.integers(0, 256)
    path.write_bytes(data)
    try:
        for producer in open_model(str(path)).producers.values():
            producer.load()
    except SourceError:
        pass


_model: list[PreTrainedModel] = []


def shared_model() -> PreTrainedModel:
    if not _model:
        _model.append(tiny_model())
    return _model[0]


def small_file(path: Path, tensors: bytes, count: int = 1, version: int = 3) -> Path:
    """A file with no metadata and hand-made tensor entries."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, count, 0) + tensors + bytes(256))
    return path


def tensor_entry(name: str, shape: list[int], code: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name.encode() + sizes + struct.pack("<IQ", code, offset)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (tensor_entry("a", [4], 0, 0) + tensor_entry("b", [4], 0, 0), "overlaps"),
        (tensor_entry("a", [4], 0, 0) + tensor_entry("b", [4], 0, 16), "'b' is malformed"),
        (tensor_entry("a", [4], 0, 0) + tensor_entry("b", [4], 0, 64), "'b' does not begin where"),
        (tensor_entry("a", [4], 0, 0) + tensor_entry("a", [4], 0, 32), "'a' occurs twice"),
        (tensor_entry("a", [], 0, 0) + tensor_entry("b", [4], 0, 32), "'a' has 0 dimensions"),
        (tensor_entry("a", [1 << 62] * 4, 0, 0) + tensor_entry("b", [4], 0, 32), "'a' ends at"),
        (tensor_entry("a", [0], 0, 0) + tensor_entry("b", [4], 0, 0), "'a' is malformed"),
        (tensor_entry("a", [33], 8, 0) + tensor_entry("b", [4], 0, 64), "'a' is malformed"),
        (tensor_entry("a", [4], 99, 0) + tensor_entry("b", [4], 0, 64), "unknown encoding 99"),
        (tensor_entry("a", [4], 24, 0) + tensor_entry("b", [4], 0, 64), "encoding I8, which"),
        (tensor_entry("a", [1] * 5, 0, 0) + tensor_entry("b", [4], 0, 64), "5 dimensions"),
        (tensor_entry("a", [4], 0, 0) + tensor_entry("b", [400], 0, 32), "'b' ends at byte"),
    ],
)
def test_corrupt_tensor_table(tmp_path: Path, tensors: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_gguf(small_file(tmp_path / "m.gguf", tensors, count=2))


def test_other_versions_and_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="GGUF version 1"):
        read_gguf(small_file(tmp_path / "m.gguf", b"", version=1))
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(64))
    with pytest.raises(SourceError, match="is not a GGUF file"):
        read_gguf(tmp_path / "m.gguf")


def test_one_part_of_several(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SourceError, match=r"one of 3 parts.*llama-gguf-split"):
        read_gguf(tmp_path / "m.gguf")
