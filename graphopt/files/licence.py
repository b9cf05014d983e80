"""The licence of a model folder as files, which go along with whatever is made of the model."""

from __future__ import annotations

from pathlib import Path

from graphopt.files.confined import files_inside
from graphopt.support.inputs import read_bytes

PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
"""Names of the files that must go along with a model."""

_MOST_FILES, _MOST_BYTES = 16, 1 << 20


def licence_files(folder: Path) -> list[str]:
    """Return the paths of a model folder's licence and notices, in order.

    Raises:
        SourceError: One of them is a link out of the folder, no regular file, or larger than any
            licence.
    """
    paths = {path for pattern in PATTERNS for path in files_inside(folder, pattern)}
    files = [str(path) for path in sorted(paths)[:_MOST_FILES]]
    for path in files:  # what cannot be copied is refused before any work is done
        licence_text(path)
    return files


def licence_text(path: str) -> bytes:
    """Return the content of a licence.

    Raises:
        SourceError: It cannot be read, or is larger than any licence.
    """
    return read_bytes(Path(path), _MOST_BYTES)
