"""Files of a model folder, which stay in that folder.

A model folder was downloaded: names in its files, and the files themselves, may lead anywhere. What
is read of it, or copied out of it, is found through this module. A name is one below the folder,
and what it leads to lies in the folder too, whatever links there are. The one exception is how
huggingface_hub lays out its cache: files of `models--OWNER--NAME/snapshots/REVISION` are links to
`models--OWNER--NAME/blobs`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from graphopt.errors import SourceError

_AGAIN = "Download the folder again, from a source you trust."


def inside(root: Path, name: str) -> Path:
    """Return the path of a regular file below a folder.

    Args:
        root: The folder, which the user named.
        name: Path relative to it, with slashes; it may come from a file of the folder.

    Raises:
        SourceError: The name leads out of the folder, or to a link that does; or there is no such
            file, or it is no regular one.
    """
    path = _below(root, name)
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError as error:
        raise SourceError(f"{path} is missing.", "Complete the folder.") from error
    except (OSError, RuntimeError) as error:  # a loop of links is either
        reason = getattr(error, "strerror", None) or "its links lead in a circle"
        raise SourceError(f"{path} cannot be read: {reason}.", _AGAIN) from error
    top = root.resolve()
    if not real.is_relative_to(top) and not _is_blob(top, real):
        raise SourceError(
            f"{path} is a link to {real}, which lies outside the folder, so it is not read.",
            "Put the file itself there if it belongs to the model.",
        )
    if not real.is_file():
        raise SourceError(f"{path} is no regular file.", _AGAIN)
    return path


def folder_inside(root: Path, name: str) -> Path | None:
    """Return the path of a folder below a folder; None where there is none.

    Raises:
        SourceError: The name leads out of the folder, or to a link that does.
    """
    path = _below(root, name)
    if not path.is_dir():
        return None
    if not path.resolve().is_relative_to(root.resolve()):
        raise SourceError(
            f"{path} is a link to {path.resolve()}, which lies outside the folder, so it is not "
            "read.",
            "Put the folder itself there if it belongs to the model.",
        )
    return path


def files_inside(root: Path, pattern: str) -> list[Path]:
    """Return the files in a folder, or in one below it, whose names match, in order.

    Raises:
        SourceError: One is a link out of the folder, or no regular file.
    """
    found = sorted(root.glob(pattern))
    return [inside(root, path.relative_to(root).as_posix()) for path in found if not path.is_dir()]


def _below(root: Path, name: str) -> Path:
    pure = PurePosixPath(name)
    odd = "\\" in name or ":" in name or "\0" in name
    if odd or not pure.parts or pure.is_absolute() or ".." in pure.parts:
        raise SourceError(f"{root} names the file {name!r}, which is not one below it.", _AGAIN)
    return root / pure


def _is_blob(top: Path, real: Path) -> bool:
    """True for a file that a snapshot in huggingface_hub's cache may link to.

    Both paths are resolved, so a link in the place of `blobs` makes nothing a blob.
    """
    for folder in (top, *top.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
            return real.parent == repository / "blobs"
    return False
