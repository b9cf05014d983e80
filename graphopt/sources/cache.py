"""The folder in which graphopt keeps what it downloaded or converted."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphopt.errors import SourceError

ENVIRONMENT_NAME = "GRAPHOPT_CACHE"


def cache_folder() -> Path:
    """Return the cache folder, which is made where it does not exist.

    It is what the environment variable GRAPHOPT_CACHE names, else the platform's place for caches.

    Raises:
        SourceError: The folder cannot be made.
    """
    named = os.environ.get(ENVIRONMENT_NAME)
    if named:
        folder = Path(named).expanduser()
    elif sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        folder = (Path(base) if base else Path.home() / "AppData" / "Local") / "graphopt" / "cache"
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches" / "graphopt"
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "graphopt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(
            f"The cache folder {folder} cannot be made: {error.strerror or error}.",
            f"Set {ENVIRONMENT_NAME} to a folder you may write to.",
        ) from error
    return folder


@contextmanager
def new_entry(final: Path) -> Iterator[Path]:
    """Give an empty folder to fill; at the end it becomes `final`, in one step.

    Two processes that make the same entry at once both succeed, and the first one's is kept; one
    that fails leaves nothing behind.

    Raises:
        SourceError: The cache cannot be written.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    except OSError as error:
        raise SourceError(
            f"The cache folder {final.parent} cannot be written: {error.strerror or error}.",
            f"Set {ENVIRONMENT_NAME} to a folder you may write to.",
        ) from error
    try:
        yield working
        try:
            working.rename(final)
        except OSError as error:
            if not final.is_dir():
                raise SourceError(
                    f"{final} cannot be made: {error.strerror or error}.",
                    f"Set {ENVIRONMENT_NAME} to a folder you may write to.",
                ) from error
    finally:
        shutil.rmtree(working, ignore_errors=True)
