"""A tensor that lies in a file as plain bytes."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from graphopt.errors import SourceError
from graphopt.ir.weights import Producer
from graphopt.support.inputs import open_regular

_PAGE, _BLOCK = 4096, 2**20
"""Bytes of a page of a file, and of what is read at once of small pieces."""


def read_exactly(path: Path, offset: int, count: int) -> torch.Tensor:
    """Return `count` bytes of a file from `offset` on, as uint8 [count].

    The bytes are read into memory of their own, not mapped: a map that is touched once and kept
    alive by a view would hold the file open and make the resident size hard to reason about.

    Raises:
        SourceError: The file cannot be read or is shorter than that.
    """
    buffer = torch.empty(count, dtype=torch.uint8)
    with open_regular(path) as file:
        _read_into(file, path, offset, buffer)
    return buffer


def _read_into(file: io.FileIO, path: Path, offset: int, buffer: torch.Tensor) -> None:
    """Fill a buffer with the bytes of an open file from `offset` on."""
    view, count, done = buffer.numpy().data, len(buffer), 0
    file.seek(offset)
    while done < count:
        got = file.readinto(view[done:])
        if not got:
            raise SourceError(
                f"{path} is truncated: {count} bytes were expected at {offset}, {done} are there.",
                "Download the file again.",
            )
        done += got


def read_pieces(path: Path, offset: int, count: int, size: int, stride: int) -> torch.Tensor:
    """Return `count` pieces of `size` bytes, one every `stride` bytes from `offset` on, as uint8.

    What lies between pieces is read along where they are smaller than a page, a block at a time.

    Raises:
        SourceError: The file cannot be read or is shorter than that.
    """
    together = 1 if size >= _PAGE else max(1, _BLOCK // stride)
    pieces = torch.empty(count, size, dtype=torch.uint8)
    with open_regular(path) as file:
        for first in range(0, count, together):
            number = min(together, count - first)
            length = (number - 1) * stride + size
            block = torch.empty(length, dtype=torch.uint8)
            _read_into(file, path, offset + first * stride, block)
            pieces[first : first + number] = block.as_strided((number, size), (stride, 1))
    return pieces.flatten()


@dataclass(frozen=True)
class RawTensor(Producer):
    """A row-major tensor at a byte offset of a file.

    Attributes:
        path: The file.
        offset: Where the first element lies, in bytes from the start of the file.
        shape: Sizes.
        dtype: Element type.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]  # type: ignore[misc]
    dtype: torch.dtype  # type: ignore[misc]

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        return read_exactly(self.path, self.offset, self.nbytes).view(self.dtype).view(self.shape)

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        rows, rest = self.shape[0], self.shape[1:]
        start, stop, _ = slice(start, stop).indices(rows)
        count = max(stop - start, 0)
        row_bytes = math.prod(rest) * self.dtype.itemsize
        data = read_exactly(self.path, self.offset + start * row_bytes, count * row_bytes)
        return data.view(self.dtype).view(count, *rest)

    def load_part(self, axis: int, start: int, stop: int) -> torch.Tensor:
        if axis == 0:
            return self.load_rows(start, stop)
        inner = math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
        data = read_pieces(
            self.path,
            self.offset + start * inner,
            math.prod(self.shape[:axis]),
            (stop - start) * inner,
            self.shape[axis] * inner,
        )
        return data.view(self.dtype).view(*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
