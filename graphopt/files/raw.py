"""A tensor that lies in a file as plain bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from graphopt.errors import SourceError
from graphopt.ir.weights import Producer
from graphopt.support.inputs import open_regular


def read_exactly(path: Path, offset: int, count: int) -> torch.Tensor:
    """Return `count` bytes of a file from `offset` on, as uint8 [count].

    The bytes are read into memory of their own, not mapped: a map that is touched once and kept
    alive by a view would hold the file open and make the resident size hard to reason about.

    Raises:
        SourceError: The file cannot be read or is shorter than that.
    """
    buffer = torch.empty(count, dtype=torch.uint8)
    view = buffer.numpy().data
    done = 0
    with open_regular(path) as file:
        file.seek(offset)
        while done < count:
            got = file.readinto(view[done:])
            if not got:
                break
            done += got
    if done < count:
        raise SourceError(
            f"{path} is truncated: {count} bytes were expected at {offset}, {done} are there.",
            "Download the file again.",
        )
    return buffer


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
