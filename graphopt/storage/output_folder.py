"""The folder that a compile writes: refused, locked, filled beside its place, and put there whole.

Beside an output folder OUT stand, while it is made, `.OUT.lock`, `.OUT.XXXXXXXX.part`, which
takes its name in the end, and `.OUT.work` with snapshots. The lock is the operating system's: it
ends with its process, so what a killed compile left is known to be nobody's, and the next one
deletes it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from graphopt.errors import GraphoptError, UsageError
from graphopt.support.plain import shown
from graphopt.support.quantities import format_bytes


def check_output(out: Path, force: bool) -> None:
    """Refuse an output folder that may not be written.

    Raises:
        UsageError: It exists and `force` is off, is a file or under one, or holds the working
            folder.
    """
    check_parents(out)
    if not out.exists() and not out.is_symlink():
        if out.name == "..":
            raise UsageError(f"Output {str(out)!r} has no name of its own.", "Name a new folder.")
        return
    if not out.is_dir():
        raise UsageError(f"Output {str(out)!r} is a file.", "Name a folder that does not exist.")
    if not force:
        raise UsageError(
            f"Output folder {str(out)!r} exists.", "Name another one, or replace it with --force."
        )
    if Path.cwd().resolve().is_relative_to(out.resolve()):
        raise UsageError(
            f"Output folder {str(out)!r} holds the working folder.", "Name another one."
        )


def check_parents(folder: Path) -> None:
    """Refuse a folder that cannot be made: a file stands in its path, or nothing may be written.

    Raises:
        UsageError: Naming the file, or the folder above that is not to be written in.
    """
    above = existing_parent(folder)
    if not above.is_dir():
        raise UsageError(
            f"The folder {str(folder)!r} cannot be made: {str(above)!r} is a file.",
            "Name another one.",
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(
            f"The folder {str(folder)!r} cannot be made: {str(above)!r} may not be written in.",
            "Name another one, or ask for the right to write there.",
        )


def check_room(out: Path, needed: int) -> None:
    """Refuse an output folder that the disk has no room for.

    Args:
        needed: About how many bytes will be written.

    Raises:
        GraphoptError: With what is needed and what is free.
    """
    above = existing_parent(out)
    free = shutil.disk_usage(above).free
    if needed > free:
        raise GraphoptError(
            f"No space left for the output folder {str(out)!r}: it takes about "
            f"{format_bytes(needed)}, and the disk of {str(above)!r} has {format_bytes(free)}.",
            "Free some space and run again with --resume, name a folder on another disk, or have "
            "weights stored in 16 bits (--dtype bfloat16).",
        )


def existing_parent(folder: Path) -> Path:
    """Return the nearest folder, or file, above a path that exists; the root above itself."""
    absolute = folder.absolute()
    return next((parent for parent in absolute.parents if parent.exists()), absolute)


def check_dump(folder: Path) -> None:
    """Refuse a folder for dumps that cannot be made.

    Raises:
        UsageError: It is a file or under one.
    """
    check_parents(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is a file.", "Name a folder for the dumps.")


def work_folder(out: Path) -> Path:
    """Return where the snapshots of a compile to `out` lie until it succeeds."""
    return out.parent / f".{out.name}.work"


_POSIX_LOCKS = importlib.util.find_spec("fcntl") is not None
"""Whether files are locked as on Linux and macOS; else as on Windows."""


def _try_lock(file: IO[str]) -> bool | None:
    """Lock an open file for this process.

    Returns:
        False where another process has it, None where the file system knows no locks.
    """
    try:
        if _POSIX_LOCKS:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        return None
    return True


def _holder(path: Path) -> str:
    """Return who holds a lock, as it wrote when it took it."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        said = json.loads(path.read_text(encoding="utf-8"))
        process, host, since = int(said["process"]), shown(said["host"]), str(said["since"])
        return f"process {process} on {host} since {since[:20]}"
    return "another process"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other compiles out of an output folder, and delete what killed ones left beside it.

    Raises:
        GraphoptError: Another process is writing the folder, with its number; or nothing can be
            made where it should lie.
    """
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    path = out.parent / f".{out.name}.lock"
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            file, sure = _take(path, out)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise GraphoptError(
                f"Output folder {str(out)!r} cannot be made: {error.strerror or error}.",
                "Name one on a disk that can be written to.",
            ) from error
        try:
            if sure:
                _clean(out)
            yield
        finally:
            if _POSIX_LOCKS:
                # Deleted while it is held: whoever waits finds that its file has lost its name.
                path.unlink(missing_ok=True)
                file.close()
            else:
                file.close()  # Windows deletes no open file, and another process may hold it by now
                with contextlib.suppress(PermissionError):
                    path.unlink(missing_ok=True)
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # where nothing came into it


def _take(path: Path, out: Path) -> tuple[IO[str], bool]:
    """Return the lock's file, and whether nobody else can have it."""
    while True:
        # Not "w": the file must keep what its holder wrote until it is ours.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(path, flags, 0o666), "r+", encoding="utf-8")
        try:
            taken = _try_lock(file)
            if taken is False:
                raise GraphoptError(
                    f"Output folder {str(out)!r} is being written by {_holder(path)}.",
                    "Wait until it is done, or name another folder.",
                )
            if _same(file, path):
                with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                    file.truncate()
                    host = os.uname().nodename if hasattr(os, "uname") else "this machine"
                    since = time.strftime("%Y-%m-%d %H:%M:%S")
                    json.dump({"process": os.getpid(), "host": host, "since": since}, file)
                    file.flush()
                return file, taken is True
        except BaseException:
            file.close()
            raise
        file.close()  # its last holder deleted it; there may be a new one


def _same(file: IO[str], path: Path) -> bool:
    """Return whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _clean(out: Path) -> None:
    """Delete what killed compiles left: unfinished folders, and put back an output set aside."""
    unfinished = re.compile(rf"\.{re.escape(out.name)}\.\w{{8}}\.(part|old)")
    for path in sorted(out.parent.iterdir()):
        found = unfinished.fullmatch(path.name)
        if not found or path.is_symlink() or not path.is_dir():
            continue
        if found[1] == "old" and not out.exists():
            path.rename(out)  # it was killed between two renames
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in work_folder(out).glob(".new-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def output_folder(out: Path, force: bool) -> Iterator[Path]:
    """Give a new folder beside `out` that takes its name when the body ends well.

    After an error, Ctrl-C included, the new folder is deleted and `out` is as it was. Call it
    within `locked`, which makes the folder that both are in.

    Raises:
        UsageError: See `check_output`.
    """
    check_output(out, force)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        yield fresh
        mask = os.umask(0)
        os.umask(mask)
        fresh.chmod(0o777 & ~mask)
        check_output(out, force)
        if out.exists():
            old = fresh.with_suffix(".old")
            out.rename(old)
            fresh.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            fresh.rename(out)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, GraphoptError):
            # The user knows the folder by its own name alone.
            error.message = error.message.replace(str(fresh), str(out))
        raise
