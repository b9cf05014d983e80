"""What to do about a path that leads nowhere."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path


def nearest(path: Path, also: Collection[str] = ()) -> str:
    """Return a question with what there is beside a missing path of nearly its name, or "".

    Args:
        also: Names that would be right in the working folder too.
    """
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        beside = []
    names = [*beside, *also] if path.parent == Path(".") else beside
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"Did you mean {str(path.parent / near[0])!r}?" if near else ""


def path_remedy(path: Path, problem: Exception) -> str:
    """Return what to do about a path that cannot be read, a sentence.

    Args:
        problem: What the system said.
    """
    if isinstance(problem, PermissionError):
        return "Give yourself the right to read it, or give another file."
    if not isinstance(problem, FileNotFoundError | NotADirectoryError):
        return "Check the path."
    if path.is_symlink():
        return "It is a link that leads nowhere: give the file itself."
    if question := nearest(path):
        return question
    folder = path.absolute().parent
    if folder.is_dir():
        return f"Check its name: it was looked for in {str(folder)!r}."
    there = next((above for above in folder.parents if above.is_dir()), folder)
    lacking = folder.relative_to(there).parts[0] if folder != there else folder.name
    return f"Check the path: {str(there)!r} has no folder {lacking!r}."
