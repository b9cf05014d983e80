"""The data file beside an ONNX model, written one tensor at a time."""

from __future__ import annotations

import json
import math
import struct
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import onnx_ir as ir
import torch

from graphopt.files.finite import check_finite
from graphopt.files.safetensors import CODE_OF
from graphopt.ir.weights import Weight
from graphopt.lowering.onnx.builder import ONNX_DTYPES
from graphopt.storage.stored_weight import StoredWeight
from graphopt.support.progress import Progress
from graphopt.support.tensor_bytes import tensor_bytes

STORED = (torch.float32, torch.float16, torch.bfloat16)
"""Floating-point dtypes of stored weights; a graph computes in fp32."""

_WORKERS = 2
"""One decodes a weight while the other writes one; both leave the interpreter to the rest."""


@dataclass(frozen=True)
class Layout:
    """How a weight lies in the graph's data, or several as one tensor.

    Attributes:
        weights: One, or matrices of one width whose rows follow each other.
        transposed: A matrix [out, in] is stored as [in, out].
        alternating: The weights are of one shape, and their rows take turns.
        parts: A matrix [out, in] is stored as [parts, out, in / parts].
        single: Floating-point values are stored in fp32, whatever the weights hold.
    """

    weights: tuple[Weight, ...]
    transposed: bool = False
    alternating: bool = False
    parts: int = 1
    single: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What is stored: the dtype of the weights where they have one of `STORED`, else fp32."""
        dtypes = {weight.dtype for weight in self.weights}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        if not dtype.is_floating_point:
            return dtype
        return torch.float32 if self.single or dtype not in STORED else dtype

    @property
    def key(self) -> object:
        """What is equal for equal bytes."""
        names = tuple(weight.name for weight in self.weights)
        return names, self.transposed, self.alternating, self.parts, self.single

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.weights[0].shape
        if len(self.weights) > 1:
            shape = (sum(weight.shape[0] for weight in self.weights), *shape[1:])
        if self.parts > 1:
            return (self.parts, shape[0], shape[1] // self.parts)
        return shape[::-1] if self.transposed else shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def is_concatenated(self) -> bool:
        """Whether every weight lies there as it is, row-major, one behind the other."""
        return not (self.transposed or self.alternating or self.parts > 1)

    def tensors(self, label: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what lies there, by name: the weights, or the whole by its label."""
        if self.is_concatenated:
            return {weight.name: weight.shape for weight in self.weights}
        return {label: self.shape}

    def load(self) -> torch.Tensor:
        """Return the value as it is stored.

        Raises:
            SourceError: A weight cannot be read, or holds NaN or infinity.
        """
        values: list[torch.Tensor] = []
        for weight in self.weights:
            values.append(weight.load(self.dtype))
            check_finite(weight.name, values[-1])
        if self.alternating:
            value = torch.stack(values, 1).flatten(0, 1)
        else:
            value = values[0] if len(values) == 1 else torch.cat(values)
        if self.parts > 1:
            value = value.unflatten(1, (self.parts, -1)).transpose(0, 1)
        return (value.t() if self.transposed else value).contiguous()

    def places(self, file: str, offset: int) -> dict[str, StoredWeight]:
        """Return where each weight lies, by name, when the tensor starts at an offset."""
        turned = self.transposed or self.parts > 1
        places: dict[str, StoredWeight] = {}
        start = 0
        for number, weight in enumerate(self.weights):
            rows: tuple[int, ...] | None = None
            if self.is_concatenated:
                places[weight.name] = StoredWeight(file, offset, weight.shape, self.dtype)
                offset += weight.numel * self.dtype.itemsize
                continue
            if self.alternating:
                rows = (number, self.shape[0], len(self.weights))
            elif len(self.weights) > 1:
                rows = (start, start + weight.shape[0])
                start += weight.shape[0]
            places[weight.name] = StoredWeight(file, offset, self.shape, self.dtype, turned, rows)
        return places


class DataFile:
    """Lays weights out, hands out tensors that point at them, and writes them.

    Attributes:
        path: The file.
        storage: Where each program weight ended up, relative to the output folder.
    """

    # Runtimes map the file; tensors that start on a page can be used where they lie.
    alignment: ClassVar[int] = 4096

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.root = root
        self.reserved: list[tuple[int, Layout, str]] = []
        self._end = 0
        self._places: dict[object, int] = {}

    def reserve(
        self, layout: Layout, name: str, shape: Sequence[int] | None = None
    ) -> ir.ExternalTensor:
        """Give weights their place, one for all graphs; return a tensor that points there.

        Args:
            name: The name of the tensor.
            shape: What the graph takes the tensor for; None for the layout's own shape.
        """
        nbytes = layout.nbytes
        if layout.key not in self._places:
            self._places[layout.key] = self._end
            self.reserved.append((self._end, layout, name))
            self._end = _rounded_up(self._end + nbytes, self.alignment)
        start = self._places[layout.key]
        return ir.ExternalTensor(
            self.path.name,
            start,
            nbytes,
            ONNX_DTYPES[layout.dtype],
            shape=ir.Shape(layout.shape if shape is None else shape),
            name=name,
            base_dir=self.path.parent,
        )

    @property
    def storage(self) -> dict[str, StoredWeight]:
        file = self.path.relative_to(self.root).as_posix()
        places: dict[str, StoredWeight] = {}
        for offset, layout, _ in self.reserved:
            places |= layout.places(file, offset)
        return places

    def write(self, progress: Progress) -> None:
        """Write every reserved weight; a few are in memory at a time, read side by side.

        Raises:
            SourceError: A weight cannot be read, or holds NaN or infinity.
        """
        done, total = 0, sum(layout.nbytes for _, layout, _ in self.reserved)
        with self.path.open("wb") as file, ThreadPoolExecutor(_WORKERS) as pool:
            file.truncate(self._end)
            waiting: deque[Future[None]] = deque()
            turn = threading.Lock()
            try:
                for offset, layout, _ in self.reserved:
                    progress("writing weights", done, total)
                    done += layout.nbytes
                    waiting.append(pool.submit(_write, file, turn, offset, layout))
                    if len(waiting) > _WORKERS:
                        waiting.popleft().result()
                while waiting:
                    waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)
            progress("writing weights", total, total)


class SafetensorsDataFile(DataFile):
    """A data file that is a safetensors file as well, of which other forms read weights by name.

    Weights that lie in it as they are have their own names there. Gaps, which the format has not,
    are tensors of bytes called `padding.N`.

    Args:
        weights: All that may be given a place.
    """

    # What the elements of any dtype, and the registers of a processor, ask for.
    alignment: ClassVar[int] = 64

    def __init__(self, path: Path, root: Path, weights: Iterable[Weight]) -> None:
        super().__init__(path, root)
        # The header comes first, and how long it will be hangs on where tensors lie behind it.
        room = sum(_ENTRY_ROOM + len(json.dumps(weight.name)) for weight in weights)
        self._header = self._end = _rounded_up(_PREFIX + room, DataFile.alignment)

    def write(self, progress: Progress) -> None:
        super().write(progress)
        text = json.dumps(self._entries(), separators=(",", ":")).encode()
        length = self._header - _PREFIX
        assert len(text) <= length
        with self.path.open("r+b") as file:
            file.write(struct.pack("<Q", length) + text.ljust(length))

    def _entries(self) -> dict[str, Any]:
        # transformers refuses files that do not say which framework wrote them.
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = self._header

        def add(name: str, shape: Sequence[int], dtype: torch.dtype, start: int) -> int:
            end = start + math.prod(shape) * dtype.itemsize
            entries[name] = {
                "dtype": CODE_OF[dtype],
                "shape": list(shape),
                "data_offsets": [start - self._header, end - self._header],
            }
            return end

        for number, (offset, layout, label) in enumerate(self.reserved):
            if offset > position:
                add(f"padding.{number}", [offset - position], torch.uint8, position)
            position = offset
            for name, shape in layout.tensors(label).items():
                position = add(name, shape, layout.dtype, position)
        if self._end > position:
            add("padding", [self._end - position], torch.uint8, position)
        return entries


_PREFIX = 8
"""Bytes that hold the length of a safetensors header."""

_ENTRY_ROOM = 320
"""Bytes of a header for a tensor and for padding behind it, beside the tensor's name."""


def _rounded_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _write(file: BinaryIO, turn: threading.Lock, offset: int, layout: Layout) -> None:
    data = tensor_bytes(layout.load()).numpy().data
    with turn:
        file.seek(offset)
        file.write(data)
