"""Where a weight lies in an output folder."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StoredWeight:
    """Where the bytes of a weight lie in an output folder.

    Attributes:
        file: Path relative to the output folder.
        offset: First byte in the file.
        shape: Shape as stored, row-major.
        dtype: Element type as stored.
        transposed: The weight is a matrix [out, in], stored as [in, out], or as
            [parts, out, in / parts]: equal parts of its columns, one behind the other.
        rows: The weight is these rows (first, end), or (first, end, step), of what is stored;
            None for all of it.
    """

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    rows: tuple[int, ...] | None = None
