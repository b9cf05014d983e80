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

from graphopt.ir.weights import Weight
from graphopt.lowering.base import StoredWeight
from graphopt.lowering.onnx.builder import ONNX_DTYPES
from graphopt.progress import Progress
from graphopt.sources.check import check_finite

# Runtimes map the file; tensors that start on a page can be used where they lie.
ALIGNMENT = 4096

_WORKERS = 2
"""One decodes a weight while the other writes one; both leave the interpreter to the rest."""


@dataclass
class Reserved:
    """The place of a weight in the data file, or of several side by side, before any is read.

    Attributes:
        weights: One, or matrices of one width whose rows follow each other.
        transposed: A matrix [out, in] is stored as [in, out].
    """

    weights: tuple[Weight, ...]
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class DataFile:
    """Lays weights out, hands out tensors that point at them, and writes them.

    Attributes:
        path: The file.
        storage: Where each program weight ended up, relative to the output folder.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.root = root
        self.reserved: list[Reserved] = []
        self._end = 0

    def reserve(self, weights: Sequence[Weight], transposed: bool) -> ir.ExternalTensor:
        """Give a weight its place, or several as one matrix; return a tensor that points there.

        Args:
            weights: Several must be matrices of equal width.
            transposed: Store [in, out] rather than [out, in].
        """
        first = weights[0]
        dtype = torch.float32 if first.dtype.is_floating_point else first.dtype
        shape = first.shape
        if len(weights) > 1:
            shape = (sum(weight.shape[0] for weight in weights), *first.shape[1:])
        shape = shape[::-1] if transposed else shape
        item = Reserved(tuple(weights), self._end, shape, dtype, transposed)
        self.reserved.append(item)
        self._end = -(-(self._end + item.nbytes) // ALIGNMENT) * ALIGNMENT
        return ir.ExternalTensor(
            self.path.name,
            item.offset,
            item.nbytes,
            ONNX_DTYPES[dtype],
            shape=ir.Shape(shape),
            name=first.name,
            base_dir=self.path.parent,
        )

    @property
    def storage(self) -> dict[str, StoredWeight]:
        file = self.path.relative_to(self.root).as_posix()
        places: dict[str, StoredWeight] = {}
        for item in self.reserved:
            row = 0
            for weight in item.weights:
                rows = (row, row + weight.shape[0]) if len(item.weights) > 1 else None
                places[weight.name] = StoredWeight(
                    file, item.offset, item.shape, item.dtype, item.transposed, rows
                )
                row += weight.shape[0] if weight.shape else 0
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
                for done, item in enumerate(self.reserved):
                    progress("writing weights", done, total)
                    waiting.append(pool.submit(_write, file, turn, item))
                    if len(waiting) > _WORKERS:
                        waiting.popleft().result()
                while waiting:
                    waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)
            progress("writing weights", total, total)


def _write(file: BinaryIO, turn: threading.Lock, item: Reserved) -> None:
    parts: list[torch.Tensor] = []
    for weight in item.weights:
        parts.append(weight.load(torch.float32))
        check_finite(weight.name, parts[-1])
    value = parts[0] if len(parts) == 1 else torch.cat(parts)
    if item.transposed:
        value = value.t()
    data = value.contiguous().numpy().data.cast("B")
    with turn:
        file.seek(item.offset)
        file.write(data)
