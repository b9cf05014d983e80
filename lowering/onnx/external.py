"""The data file beside an ONNX model, written one tensor at a time."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
import torch

from graphopt.files.finite import check_finite
from graphopt.ir.weights import Weight
from graphopt.lowering.onnx.builder import ONNX_DTYPES
from graphopt.storage.stored_weight import StoredWeight
from graphopt.support.progress import Progress

# Runtimes map the file; tensors that start on a page can be used where they lie.
ALIGNMENT = 4096

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
    """

    weights: tuple[Weight, ...]
    transposed: bool = False
    alternating: bool = False
    parts: int = 1

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.weights[0].dtype
        return torch.float32 if dtype.is_floating_point else dtype

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

    def load(self) -> torch.Tensor:
        """Return the value as it is stored.

        Raises:
            SourceError: A weight cannot be read, or holds NaN or infinity.
        """
        values: list[torch.Tensor] = []
        for weight in self.weights:
            values.append(weight.load(torch.float32))
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

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.root = root
        self.reserved: list[tuple[int, Layout]] = []
        self._end = 0

    def reserve(
        self, layout: Layout, name: str, shape: Sequence[int] | None = None
    ) -> ir.ExternalTensor:
        """Give weights their place; return a tensor that points there.

        Args:
            name: The name of the tensor.
            shape: What the graph takes the tensor for; None for the layout's own shape.
        """
        start, nbytes = self._end, layout.numel * layout.dtype.itemsize
        self.reserved.append((start, layout))
        self._end = -(-(start + nbytes) // ALIGNMENT) * ALIGNMENT
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
        for offset, layout in self.reserved:
            places |= layout.places(file, offset)
        return places

    def write(self, progress: Progress) -> None:
        """Write every reserved weight; a few are in memory at a time, read side by side.

        Raises:
            SourceError: A weight cannot be read, or holds NaN or infinity.
        """
        total = len(self.reserved)
        with self.path.open("wb") as file, ThreadPoolExecutor(_WORKERS) as pool:
            file.truncate(self._end)
            waiting: deque[Future[None]] = deque()
            turn = threading.Lock()
            try:
                for done, (offset, layout) in enumerate(self.reserved):
                    progress("writing weights", done, total)
                    waiting.append(pool.submit(_write, file, turn, offset, layout))
                    if len(waiting) > _WORKERS:
                        waiting.popleft().result()
                while waiting:
                    waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)
            progress("writing weights", total, total)


def _write(file: BinaryIO, turn: threading.Lock, offset: int, layout: Layout) -> None:
    data = layout.load().numpy().data.cast("B")
    with turn:
        file.seek(offset)
        file.write(data)
