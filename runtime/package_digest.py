"""What a package consists of, in a few letters for each file and tensor, to be compared."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

SAMPLE = 1024
"""Bytes at the beginning, in the middle and at the end of a tensor that are looked at."""


def package_digest(code: Path, weights: Path) -> dict[str, str]:
    """Return a digest of each source file of a package, and of each tensor of its weights.

    Of a tensor, its dtype, its shape and three samples count: weights that were trained, rounded or
    cast in another way differ in them, and tens of gigabytes need not be read.

    Args:
        code: The folder of `model.py`. Sources and machine code in it and in its packages count.
        weights: The folder of `model.safetensors`, or of the index of the files that hold weights.
    """
    found: dict[str, str] = {}
    for path in sorted(code.rglob("*")):
        # Other forms beside the package do not count.
        top = code / path.relative_to(code).parts[0]
        own = path == top or (top / "__init__.py").exists()
        if own and path.suffix in (".py", ".cu", ".cubin", ".ptx") and path.is_file():
            found[path.relative_to(code).as_posix()] = _digest(path.read_bytes())
    index = weights / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in sorted(files):
        found |= {f"tensor {key} of {name}": text for key, text in _tensors(weights / name).items()}
    return found


def differences(digests: Sequence[Mapping[str, str]]) -> dict[int, list[str]]:
    """Return the ranks whose packages are not that of the first, with what differs in each."""
    first = digests[0]
    return {
        rank: [name for name in {**first, **other} if first.get(name) != other.get(name)]
        for rank, other in enumerate(digests)
        if other != first
    }


def _tensors(path: Path) -> dict[str, str]:
    """Return a digest of every tensor of a safetensors file."""
    found: dict[str, str] = {}
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            parts = [json.dumps([entry["dtype"], entry["shape"]]).encode()]
            for offset in (start, (start + end) // 2, max(start, end - SAMPLE)):
                file.seek(8 + length + offset)
                parts.append(file.read(min(SAMPLE, end - offset)))
            found[name] = _digest(b"".join(parts))
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
