"""Reading and writing safetensors files, one tensor at a time.

The format: eight bytes with the length of a JSON header, the header, then the tensors' bytes
without gaps (https://github.com/huggingface/safetensors#format). The header alone says where a
tensor lies, so weights are read as byte ranges and written at known offsets, and a model is
never in memory as a whole.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import pydantic
import torch

from graphopt.errors import GraphoptError, SourceError
from graphopt.files.confined import inside
from graphopt.files.finite import check_finite
from graphopt.files.raw import RawTensor, read_exactly
from graphopt.files.refusals import QUANTISED_CODES, REMEDY
from graphopt.ir.weights import Array, Producer
from graphopt.support.inputs import (
    OpenSchema,
    Schema,
    Size,
    open_regular,
    parse,
    parse_json,
    read_json,
)
from graphopt.support.plain import shown
from graphopt.support.tensor_bytes import tensor_bytes

DTYPE_OF: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CODE_OF: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPE_OF.items()}

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a larger length means that the file is something else."""

BLOCK_BYTES = 16 * 2**20
"""How much of a large tensor is in memory at once while it is copied."""

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class _Entry(Schema):
    """What the header says of a tensor."""

    dtype: str
    shape: Annotated[list[Size], pydantic.Field(max_length=16)]
    data_offsets: Annotated[list[Size], pydantic.Field(min_length=2, max_length=2)]


class _Header(pydantic.RootModel[dict[str, dict[str, Any]]]):
    """Tensors by name; each is parsed for itself, so that one error is kept, not one of each."""


class _Index(OpenSchema):
    """Which shard holds which tensor."""

    weight_map: dict[str, str]


def read_header(path: Path) -> dict[str, RawTensor]:
    """Return the tensors of a safetensors file, unread, in the order of their offsets.

    Raises:
        SourceError: The file cannot be read, is truncated or is not safetensors; the header is
            damaged; a dtype is unknown; or tensors overlap, leave gaps or do not fill the file.
    """
    path = Path(path)
    again = "Download the file again."
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise SourceError(f"{path} is truncated: it has {size} bytes.", again)
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise SourceError(f"{path} is not a safetensors file or is corrupt.", again)
        if 8 + length > size:
            raise SourceError(
                f"{path} is truncated: its header takes {length} bytes and the file has {size}.",
                again,
            )
        text = read_exactly(path, 8, length).numpy().tobytes()
    where = f"{path} is corrupt: its header"
    header = parse_json(text, where, remedy=again)
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    entries: list[tuple[str, str, tuple[int, ...], int, int]] = []
    for name, data in parse(_Header, header, where, remedy=again).root.items():
        entry = parse(_Entry, data, f"{where}, tensor {shown(name)}", remedy=again)
        start, stop = entry.data_offsets
        entries.append((name, entry.dtype, tuple(entry.shape), start, stop))

    base, end = 8 + length, 0
    tensors: dict[str, RawTensor] = {}
    for name, code, shape, start, stop in sorted(entries, key=lambda entry: entry[3:]):
        if code in QUANTISED_CODES:
            raise SourceError(
                f"{path} holds quantised weights: tensor {name!r} has elements of type {code}.",
                REMEDY,
            )
        if code not in DTYPE_OF:
            raise SourceError(
                f"{path}: tensor {name!r} has the unknown dtype {code!r}.",
                f"Convert it to one of {', '.join(DTYPE_OF)}.",
            )
        dtype = DTYPE_OF[code]
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise SourceError(
                f"{path} is corrupt: tensor {name!r} of shape {list(shape)} and dtype {code} "
                f"takes {stop - start} bytes.",
                again,
            )
        if start < end:
            raise SourceError(f"{path} is corrupt: tensor {name!r} overlaps another one.", again)
        if start > end:
            raise SourceError(f"{path} is corrupt: there is a gap before {name!r}.", again)
        if base + stop > size:
            raise SourceError(
                f"{path} is truncated: tensor {name!r} ends at byte {base + stop} and the file "
                f"has {size}.",
                again,
            )
        end = stop
        tensors[name] = RawTensor(path, base + start, shape, dtype)
    if base + end != size:
        raise SourceError(
            f"{path} is corrupt: {size - base - end} bytes follow the last tensor.", again
        )
    return tensors


def read_weight_map(path: Path) -> dict[str, str]:
    """Return which file holds which tensor, as an index says.

    Raises:
        SourceError: The index cannot be read or is none.
    """
    return parse(_Index, read_json(path), str(path)).weight_map


def read_checkpoint(folder: Path) -> dict[str, RawTensor]:
    """Return the tensors of `model.safetensors`, or of the shards its index names, unread.

    Raises:
        SourceError: Neither file is there, the index is damaged, a shard it names is missing or
            lacks a tensor, or a file is damaged.
    """
    folder = Path(folder)
    if (folder / WEIGHTS_NAME).exists():
        return read_header(inside(folder, WEIGHTS_NAME))
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        raise SourceError(
            f"{folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}.",
            "graphopt reads safetensors checkpoints only.",
        )
    shards: dict[str, list[str]] = {}
    for name, shard in read_weight_map(inside(folder, INDEX_NAME)).items():
        shards.setdefault(shard, []).append(name)
    for shard in shards:
        if Path(shard).name != shard:
            raise SourceError(
                f"{index_path} names the shard {shown(shard)}, which lies outside the folder.",
                "Download the file again.",
            )
    missing = [shard for shard in sorted(shards) if not (folder / shard).exists()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(
            f"Shard {missing[0]}{others} of the checkpoint is missing in {folder}.",
            "Download the missing files.",
        )
    tensors: dict[str, RawTensor] = {}
    for shard, names in shards.items():
        held = read_header(inside(folder, shard))
        for name in names:
            if name not in held:
                raise SourceError(
                    f"{index_path} places tensor {name!r} in {shard}, which does not hold it.",
                    "The index and the shards are not of one checkpoint; download them again.",
                )
            tensors[name] = held[name]
    return tensors


def blocks(producer: Producer, limit: int | None = None) -> Iterator[torch.Tensor]:
    """Yield the value of `producer` in order, in runs of rows of about `limit` bytes.

    None is `BLOCK_BYTES`.
    """
    limit = BLOCK_BYTES if limit is None else limit
    count = math.prod(producer.shape)
    if len(producer.shape) < 2 or count * producer.dtype.itemsize <= limit:
        yield producer.load()
        return
    rows = producer.shape[0]
    if type(producer).load_rows is Producer.load_rows:
        # It knows no way to read a part, and would read the whole for every part.
        producer = Array(producer.load())
    step = max(1, limit * rows // (count * producer.dtype.itemsize))
    for start in range(0, rows, step):
        yield producer.load_rows(start, min(start + step, rows))


class SafetensorsWriter:
    """Writes a safetensors file whose names, shapes and dtypes are known beforehand.

    Tensors may be written in any order. Used as a context manager, it checks at the end that
    every tensor was written; after an exception the file is left incomplete, so write into a
    temporary place.

    Args:
        path: File to make or replace.
        tensors: (shape, dtype) of every tensor by name.
        metadata: Text entries of the header.

    Raises:
        GraphoptError: The disk is full or the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[Iterable[int], torch.dtype]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        # transformers refuses files that do not say which framework wrote them.
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        position = 0
        spans: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        # Wide elements first, so that every tensor is aligned without gaps.
        for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
            sizes = tuple(int(size) for size in shape)
            end = position + math.prod(sizes) * dtype.itemsize
            header[name] = {
                "dtype": CODE_OF[dtype],
                "shape": list(sizes),
                "data_offsets": [position, end],
            }
            spans[name] = (position, sizes, dtype)
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        self.tensors: dict[str, RawTensor] = {
            name: RawTensor(self.path, base + start, sizes, dtype)
            for name, (start, sizes, dtype) in spans.items()
        }
        """Where every tensor lies, also before it is written."""
        self._left = set(spans)
        with self._clear_errors():
            self._file = self.path.open("wb")
            self._file.write(struct.pack("<Q", len(text)) + text)
            self._file.truncate(base + position)

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "Free some space." if error.errno == errno.ENOSPC else ""
            raise GraphoptError(
                f"{self.path} cannot be written: {error.strerror or error}.", remedy
            ) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, whose shape and dtype must be the announced ones.

        Raises:
            GraphoptError: The disk is full or the file cannot be written.
        """
        place = self.tensors[name]
        if tuple(tensor.shape) != place.shape or tensor.dtype != place.dtype:
            raise ValueError(
                f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}, announced as "
                f"{place.dtype} {place.shape}"
            )
        self._put(place.offset, tensor)
        self._left.discard(name)

    def copy(self, name: str, producer: Producer) -> None:
        """Write the value of `producer`, cast to the announced dtype, block of rows by block.

        Raises:
            SourceError: The value cannot be read or is not finite.
            GraphoptError: The disk is full or the file cannot be written.
        """
        place = self.tensors[name]
        if tuple(producer.shape) != place.shape:
            raise ValueError(f"{name!r} has shape {producer.shape}, announced as {place.shape}")
        offset = place.offset
        for block in blocks(producer):
            check_finite(name, block)
            offset += self._put(offset, block.to(place.dtype))
        self._left.discard(name)

    def _put(self, offset: int, tensor: torch.Tensor) -> int:
        """Write the elements of `tensor` at `offset` and return how many bytes they took."""
        data = tensor_bytes(tensor).numpy().data
        with self._clear_errors():
            self._file.seek(offset)
            self._file.write(data)
        return int(data.nbytes)

    def close(self) -> None:
        """Finish the file.

        Raises:
            GraphoptError: The disk is full.
            ValueError: A tensor was announced and not written.
        """
        with self._clear_errors():
            self._file.close()
        if self._left:
            raise ValueError(f"{self.path}: {sorted(self._left)[0]!r} was not written")

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(OSError):
                self._file.close()
