"""Damaged GGUF files give a model or one sentence, in little time and memory."""

from __future__ import annotations

import math
import random
import resource
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_models import GGUF_ARCHITECTURES, tiny_model, write_gguf
from vocabularies import ranked, scored

from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.execute.interpreter import Runner  # noqa: F401  (imported before memory is measured
from graphopt.sources import open_model
from graphopt.sources.gguf.container import MOST_ENTRIES, MOST_TENSORS, MOST_VALUES, read_gguf

KINDS = ["llama", "gemma3_text", "phi3", "gpt2"]
MORE_MEMORY = 1 << 30
"""Bytes that all tries together may add to what the process has held at most."""

SECONDS = 30.0
"""Of the processor, for one try."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))


def small_file(path: Path, model_type: str) -> Path:
    architecture, entries = GGUF_ARCHITECTURES[model_type]
    sizes: dict[str, Any] = {"vocab_size": 700}
    if model_type == "gemma3_text":
        sizes["num_hidden_layers"] = 2
    vocabulary = scored() if model_type in ("llama", "gemma3_text") else ranked()
    return write_gguf(
        path, tiny_model(model_type, **entries | sizes), architecture,
        entries={f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()},
    )  # fmt: skip


def outcome(path: Path, *, whole: bool = False) -> str:
    """Open and load; what it came to. Any error but graphopt's own is the test's."""
    start = time.process_time()
    try:
        source = open_model(str(path))
        for producer in source.producers.values():
            producer.load()
        if whole:
            capture(source)
        return "read"
    except GraphoptError as error:
        assert error.message and "\n" not in error.message
        str(error).encode("utf-8")  # it can be printed
        return "refused"
    finally:
        assert time.process_time() - start < SECONDS


@pytest.fixture
def memory() -> Any:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MORE_MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.usefixtures("memory")
def test_bytes_changed(tmp_path: Path, model_type: str) -> None:
    """Bytes of the header flipped, cut out, doubled and overwritten by large numbers."""
    path = small_file(tmp_path / "m.gguf", model_type)
    data = path.read_bytes()
    header = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    # The vocabulary is most of the header and its bytes are alike: half the places lie outside.
    plain = [place for place in range(header) if not in_vocabulary(data, place)]
    draw = random.Random(model_type)
    seen = set()
    for _ in range(60):
        changed = bytearray(data)
        place = draw.choice(plain) if draw.random() < 0.6 else draw.randrange(header)
        how = draw.randrange(5)
        if how == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif how == 1:
            changed[place : place + 8] = struct.pack("<Q", draw.choice([0, 1, 1 << 31, 2**64 - 1]))
        elif how == 2:
            del changed[place : place + draw.randrange(1, 9)]
        elif how == 3:
            changed[place:place] = changed[place : place + draw.randrange(1, 40)]
        else:
            changed[place : place + 4] = draw.randbytes(4)
        (tmp_path / "n.gguf").write_bytes(changed)
        seen.add(outcome(tmp_path / "n.gguf"))
    assert "refused" in seen


def in_vocabulary(data: bytes, place: int) -> bool:
    first = data.index(b"tokenizer.ggml.tokens") + 32
    last = data.index(b"tokenizer.ggml.bos_token_id")
    return first < place < last


VALUES: list[Any] = [
    0, -1, 1, 3, 7, 1 << 31, -(1 << 31), 2**63 - 1, -(2**63), 0.0, -1.5, 1e38, math.nan, math.inf,
    True, False, "", "text", "caf\u00e9 \u001b[31m", "x" * 5000, [1], [1, 2], [0.5, 1.5], ["a"],
    ["a", "a"], [True, False], list(range(700)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.usefixtures("memory")
def test_entries_of_other_types(tmp_path: Path, model_type: str) -> None:
    """Every entry of a file with values that it could not have meant, and some that it could."""
    path = small_file(tmp_path / "m.gguf", model_type)
    reader = gguf.GGUFReader(path)
    draw = random.Random(model_type)
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    prefix = f"{gguf.MODEL_ARCH_NAMES[GGUF_ARCHITECTURES[model_type][0]]}."
    keys += [prefix + key for key in ("rope.scaling.type", "rope.scaling.factor", "expert_count")]
    keys += ["general.type", "general.alignment", "split.count", "tokenizer.chat_template"]
    architecture, entries = GGUF_ARCHITECTURES[model_type]
    sizes: dict[str, Any] = {"vocab_size": 700}
    if model_type == "gemma3_text":
        sizes["num_hidden_layers"] = 2
    model = tiny_model(model_type, **entries | sizes)
    vocabulary = scored() if model_type in ("llama", "gemma3_text") else ranked()
    named = {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    seen = set()
    for key in keys:
        for value in draw.sample(VALUES, 3):
            kind = gguf.GGUFValueType.get_type(value)
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 31:
                kind = gguf.GGUFValueType.INT64
            write_gguf(
                tmp_path / "n.gguf", model, architecture, entries=named | {key: (value, kind)}
            )
            seen.add(outcome(tmp_path / "n.gguf", whole=draw.random() < 0.05))
    assert seen == {"read", "refused"}


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


HOSTILE: dict[str, bytes] = {
    "2^63 entries": struct.pack("<QQ", 0, 1 << 63),
    "2^63 tensors": struct.pack("<QQ", 1 << 63, 0),
    "entries without end": struct.pack("<QQ", 0, MOST_ENTRIES + 1),
    "tensors without end": struct.pack("<QQ", MOST_TENSORS + 1, 0),
    "a text of 2^63 bytes": struct.pack("<QQQ", 0, 1, 1 << 63),
    "a list of 2^63 numbers": struct.pack("<QQ", 0, 1) + string(b"k")
    + struct.pack("<IIQ", 9, 0, 1 << 63),
    "a list of 2^63 texts": struct.pack("<QQ", 0, 1) + string(b"k")
    + struct.pack("<IIQ", 9, 8, 1 << 63),
    "a list of many numbers": struct.pack("<QQ", 0, 1) + string(b"k")
    + struct.pack("<IIQ", 9, 0, MOST_VALUES + 1),
    "a list of lists": struct.pack("<QQ", 0, 1) + string(b"k") + struct.pack("<IIQ", 9, 9, 4),
    "an unknown type": struct.pack("<QQ", 0, 1) + string(b"k") + struct.pack("<I", 77),
    "a name that is no text": struct.pack("<QQ", 1, 0) + string(b"\xff\xfe\x1b[31m")
    + struct.pack("<IQIQ", 1, 4, 0, 0),
    "an architecture that is no text": struct.pack("<QQ", 0, 1)
    + string(b"general.architecture") + struct.pack("<I", 8) + string(b"\xff\x1b[31m"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.usefixtures("memory")
def test_headers_that_announce_too_much(tmp_path: Path, case: str) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + HOSTILE[case] + bytes(4096))
    assert outcome(tmp_path / "m.gguf") == "refused"


@pytest.mark.slow
@pytest.mark.usefixtures("memory")
def test_a_header_without_end(tmp_path: Path) -> None:
    """A hole in the file, which costs no disk: as many empty texts as are announced."""
    with (tmp_path / "m.gguf").open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 100))
        for number in range(100):
            file.write(string(str(number).encode()) + struct.pack("<IIQ", 9, 8, MOST_VALUES))
            file.seek(8 * MOST_VALUES, 1)
        file.truncate(file.tell())
    assert outcome(tmp_path / "m.gguf") == "refused"


def test_byte_order_and_versions(tmp_path: Path) -> None:
    for version, message in (
        (struct.pack(">I", 3), "big-endian"), (struct.pack("<I", 1), "version 1"),
        (struct.pack("<I", 4), "version 4"),
    ):  # fmt: skip
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + version + bytes(64))
        with pytest.raises(GraphoptError, match=message):
            open_model(str(tmp_path / "m.gguf"))
