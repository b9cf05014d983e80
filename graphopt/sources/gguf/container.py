"""The header of a GGUF file: metadata and where every tensor lies.

The `gguf` package has a reader of its own, which spends seconds on a vocabulary of 50 000 tokens
and maps the tensors it has not checked to be there; this one walks the bytes once and refuses a
damaged file. Block formats and their sizes come from the package.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import itertools
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from graphopt.errors import SourceError
from graphopt.files.raw import read_exactly
from graphopt.ir.weights import Producer
from graphopt.support.inputs import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
AGAIN = "Download the file again."

# Metadata value types that have a fixed width, by their number in the format.
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9

_CHUNK_BLOCKS = 128
"""Blocks per row handed to `dequantize`, which works on 16 rows at a time: about 64 k elements,
so that its temporaries stay in the processor's cache."""
_CHUNKS = 64
"""Rows handed to it at a time: new memory for a large tensor costs more than unpacking it, so
only the result takes some."""

PLAIN = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

# No model comes near these; they keep a damaged or hostile header from filling the memory.
MOST_HEADER_BYTES = 1 << 26
MOST_ENTRIES = 1 << 14
MOST_TENSORS = 1 << 17
MOST_VALUES = 1 << 22


@dataclass(frozen=True)
class GgufTensor(Producer):
    """A tensor of a GGUF file: numbers of 16 bits as they are, and all else as fp32.

    Attributes:
        path: The file.
        offset: Where its bytes start.
        shape: Sizes, outermost first (a GGUF file lists them the other way round).
        ggml_type: How the elements are packed.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]  # type: ignore[misc]
    ggml_type: GGMLQuantizationType

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        kind = PLAIN.get(self.ggml_type, torch.float32)
        return kind if kind.itemsize == 2 else torch.float32

    @property
    def is_packed(self) -> bool:
        """Whether the file holds codes rather than numbers."""
        return self.ggml_type not in PLAIN

    def load(self) -> torch.Tensor:
        return self._read(0, math.prod(self.shape)).view(self.shape)

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        count, row = max(stop - start, 0), math.prod(self.shape[1:])
        return self._read(start * row, count * row).view(count, *self.shape[1:])

    def _read(self, start: int, count: int) -> torch.Tensor:
        """Return `count` elements from number `start` on; both are whole blocks."""
        elements, size = GGML_QUANT_SIZES[self.ggml_type]
        offset = self.offset + start // elements * size
        data = read_exactly(self.path, offset, count // elements * size)
        if self.ggml_type in PLAIN:
            return data.view(PLAIN[self.ggml_type]).to(self.dtype)
        raw, blocks = data.numpy(), count // elements
        result = np.empty(count, dtype=np.float32)
        whole = blocks // _CHUNK_BLOCKS * _CHUNK_BLOCKS
        starts = [*range(0, whole, _CHUNKS * _CHUNK_BLOCKS), whole, blocks]
        for first, last in itertools.pairwise(dict.fromkeys(starts)):
            width = _CHUNK_BLOCKS if last <= whole else last - first
            rows = raw[first * size : last * size].reshape(-1, width * size)
            values = dequantize(rows, self.ggml_type)
            result[first * elements : last * elements] = values.reshape(-1)
        return torch.from_numpy(result)


@dataclass(frozen=True)
class GgufFile:
    """What the header of a GGUF file says.

    Attributes:
        path: The file.
        metadata: Key -> value; arrays are lists. Bytes of a text that are no UTF-8 are lone
            surrogates, which the schemas refuse where the text is used.
        tensors: GGUF tensor name -> the tensor, unread.
        digest: SHA-256 of the header.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    digest: str

    @property
    def architecture(self) -> str:
        """The name of the architecture, which begins the keys that describe the model.

        Raises:
            SourceError: The file states none.
        """
        value = self.metadata.get("general.architecture")
        if isinstance(value, str) and value.isprintable():
            return value
        state = "is missing" if value is None else f"is {value!r:.60}"
        raise SourceError(
            f"{self.path}: the metadata entry 'general.architecture' {state}.",
            "The file is incomplete; convert the model again.",
        )


class _Cursor:
    """Reads values one after the other and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0

    def take(self, count: int) -> bytes:
        start, end = self.position, self.position + count
        if end > len(self.data):
            raise SourceError(
                f"{self.path} is truncated: its header goes on past the {len(self.data)} bytes "
                "of the file.",
                AGAIN,
            )
        if end > MOST_HEADER_BYTES:
            raise SourceError(
                f"{self.path} is corrupt: its header goes on past {MOST_HEADER_BYTES} bytes, more "
                "than any model needs.",
                AGAIN,
            )
        self.position = end
        return self.data[start:end]

    def unpack(self, format: str) -> tuple[Any, ...]:
        return struct.unpack("<" + format, self.take(struct.calcsize("<" + format)))

    def number(self, format: str) -> Any:
        return self.unpack(format)[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="surrogateescape")

    def texts(self, count: int) -> list[str]:
        """Read many texts, a vocabulary, in a fraction of the time that one by one takes."""
        size_at, data = struct.Struct("<Q").unpack_from, self.data
        most = min(len(data), MOST_HEADER_BYTES)
        position, found = self.position, []
        for _ in range(count):
            start = position + 8
            if start > most:
                position = start
                break
            position = start + size_at(data, position)[0]
            if position > most:
                break
            found.append(data[start:position].decode("utf-8", errors="surrogateescape"))
        self.take(position - self.position)  # which says what is wrong where there is too little
        return found

    def limit(self, what: str, count: int, most: int) -> None:
        """Refuse a number of `what` that is beyond reason, before it is read."""
        if count > most:
            raise SourceError(
                f"{self.path} is corrupt: it announces {count} {what}, more than {most}.", AGAIN
            )

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            item, count = self.unpack("IQ")
            self.limit("values of one entry", count, MOST_VALUES)
            if item in _FIXED:
                raw = self.take(count * struct.calcsize("<" + _FIXED[item]))
                return list(struct.unpack(f"<{count}{_FIXED[item]}", raw))
            if item == _STRING:
                return self.texts(count)
            raise SourceError(
                f"{self.path} is corrupt: it holds a list of values of the type {item}, which no "
                "model uses.",
                AGAIN,
            )
        if kind == _FLOAT32:
            # The shortest decimal that rounds to the stored number: 1e-05, not 9.99999974e-06.
            return float(str(np.float32(self.number("f"))))
        if kind in _FIXED:
            return self.number(_FIXED[kind])
        raise SourceError(
            f"{self.path} is corrupt: it holds a metadata value of unknown type {kind}.", AGAIN
        )


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises:
        SourceError: The file cannot be read, is no regular file, is truncated or corrupt, is of
            another version or byte order or one part of several, or a tensor is in an unknown
            encoding.
    """
    path = Path(path)
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise SourceError(f"{path} is empty.", AGAIN)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(_Cursor(data, path), path)


def _read_header(cursor: _Cursor, path: Path) -> GgufFile:
    if cursor.data[:4] != MAGIC:
        raise SourceError(f"{path} is not a GGUF file: it starts with {cursor.data[:4]!r}.", AGAIN)
    cursor.position = 4
    version = cursor.number("I")
    if int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS:
        raise SourceError(
            f"{path} is a GGUF file in big-endian byte order, which is not read.",
            "Convert the model for a little-endian machine.",
        )
    if version not in VERSIONS:
        raise SourceError(
            f"{path} is of GGUF version {version}, graphopt reads versions 2 and 3.",
            "Convert the model with a current llama.cpp.",
        )
    tensor_count, entry_count = cursor.unpack("QQ")
    cursor.limit("tensors", tensor_count, MOST_TENSORS)
    cursor.limit("metadata entries", entry_count, MOST_ENTRIES)
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.text()
        if key in metadata:
            raise SourceError(f"{path} is corrupt: the entry {key!r} occurs twice.", AGAIN)
        metadata[key] = cursor.value(cursor.number("I"))
    parts = metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise SourceError(
            f"{path} is one of {parts!r:.60} parts of a model.",
            "Merge them with `llama-gguf-split --merge` and name the result.",
        )
    entries = []
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.number("I")
        if not 1 <= dimensions <= 4:
            raise SourceError(f"{path} is corrupt: {name!r} has {dimensions} dimensions.", AGAIN)
        shape = tuple(reversed(cursor.unpack(f"{dimensions}Q")))
        entries.append((name, shape, *cursor.unpack("IQ")))
    header_end = cursor.position
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment % 8:
        raise SourceError(
            f"{path} is corrupt: its alignment is {alignment!r:.60}, which is no multiple of 8.",
            AGAIN,
        )
    base = -(-header_end // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    decodable: set[GGMLQuantizationType] = set(PLAIN)
    used = 0
    for name, shape, code, offset in sorted(entries, key=lambda entry: entry[3]):
        try:
            encoding = GGMLQuantizationType(code)
        except ValueError as error:
            raise SourceError(
                f"{path}: tensor {name!r} is in the unknown encoding {code}.",
                "Quantise the model in another format, or update the gguf package.",
            ) from error
        elements, size = GGML_QUANT_SIZES[encoding]
        if encoding not in decodable:
            _check_decodable(path, name, encoding)
            decodable.add(encoding)
        if name in tensors:
            raise SourceError(f"{path} is corrupt: tensor {name!r} occurs twice.", AGAIN)
        if 0 in shape or shape[-1] % elements or offset % alignment:
            raise SourceError(f"{path} is corrupt: tensor {name!r} is malformed.", AGAIN)
        if offset < used:
            raise SourceError(f"{path} is corrupt: tensor {name!r} overlaps another one.", AGAIN)
        if offset != -(-used // alignment) * alignment:
            raise SourceError(
                f"{path} is corrupt: tensor {name!r} does not begin where the one before it ends.",
                AGAIN,
            )
        used = offset + math.prod(shape) // elements * size
        if base + used > len(cursor.data):
            raise SourceError(
                f"{path} is truncated: tensor {name!r} ends at byte {base + used} and the file has "
                f"{len(cursor.data)}.",
                AGAIN,
            )
        tensors[name] = GgufTensor(path, base + offset, shape, encoding)
    digest = hashlib.sha256(cursor.data[:header_end]).hexdigest()
    return GgufFile(path, metadata, tensors, digest)


def _check_decodable(path: Path, name: str, encoding: GGMLQuantizationType) -> None:
    """Decode one empty block, so that an encoding the package lacks is refused on opening."""
    _, size = GGML_QUANT_SIZES[encoding]
    try:
        dequantize(np.zeros((1, size), dtype=np.uint8), encoding)
    except NotImplementedError as error:
        raise SourceError(
            f"{path}: tensor {name!r} is in the encoding {encoding.name}, which cannot be decoded.",
            "Quantise the model in another format, or update the gguf package.",
        ) from error
