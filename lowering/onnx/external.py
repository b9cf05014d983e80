"""The data file beside an ONNX model, written one tensor at a time."""

from __future__ import annotations

import threading
from collections import deque
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
    """A weight's place in the data file, decided before anything is read.

    Attributes:
        transposed: A matrix [out, in] is stored as [in, out].
    """

    weight: Weight
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class DataFile:
    """Lays weights out, hands out tensors that point at them, and writes them.

    Attributes:
        path: The file.
        storage: Where each program weight ended up, relative to the output folder.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.root = root
        self.reserved: dict[str, Reserved] = {}
        self._end = 0

    def reserve(self, weight: Weight, transposed: bool) -> ir.ExternalTensor:
        """Give a weight its place and return the tensor that points at it."""
        dtype = torch.float32 if weight.dtype.is_floating_point else weight.dtype
        shape = weight.shape[::-1] if transposed else weight.shape
        item = Reserved(weight, self._end, shape, dtype, transposed)
        self.reserved[weight.name] = item
        self._end = -(-(self._end + item.nbytes) // ALIGNMENT) * ALIGNMENT
        return ir.ExternalTensor(
            self.path.name,
            item.offset,
            item.nbytes,
            ONNX_DTYPES[dtype],
            shape=ir.Shape(shape),
            name=weight.name,
            base_dir=self.path.parent,
        )

    @property
    def storage(self) -> dict[str, StoredWeight]:
        file = self.path.relative_to(self.root).as_posix()
        return {
            name: StoredWeight(file, item.offset, item.shape, item.dtype, item.transposed)
            for name, item in self.reserved.items()
        }

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
                for done, item in enumerate(self.reserved.values()):
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
    value = item.weight.load(torch.float32)
    check_finite(item.weight.name, value)
    if item.transposed:
        value = value.t()
    data = value.contiguous().numpy().data.cast("B")
    with turn:
        file.seek(item.offset)
        file.write(data)
