"""Libraries of C or C++ that are compiled for the machine at hand when they are first needed.

The system's compiler makes a plain library for `ctypes`: that asks for a compiler and for nothing
else, where an extension of Python or torch would ask for their headers and their versions too. What
was compiled is kept by a digest of its sources, options and compiler. Imports nothing of graphopt,
and is copied into emitted models.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

COMPILE_SECONDS = 120
_COMPILERS = {"c": ("CC", ("cc", "gcc", "clang")), "c++": ("CXX", ("c++", "g++", "clang++"))}


class NoLibrary(Exception):
    """A library cannot be had here; the text says why, as a clause."""


def compiler_of(language: str) -> list[str]:
    """Return the command of the compiler of `c` or `c++`: that of CC or CXX, or the system's.

    Raises:
        NoLibrary: There is none.
    """
    variable, known = _COMPILERS[language]
    asked = shlex.split(os.environ.get(variable, ""))
    names = [asked] if asked else [[name] for name in known]
    for name in names:
        if shutil.which(name[0]):
            return name
    listed = " or ".join(" ".join(name) for name in names)
    raise NoLibrary(f"there is no {language.upper()} compiler ({listed})")


def native_library(
    sources: Mapping[str, str], main: str, options: Sequence[str], language: str = "c++"
) -> ctypes.CDLL:
    """Return a library, compiled now or before.

    Args:
        sources: The text of every file, by name.
        main: The one that is compiled; it includes the others.
        options: Of the compiler.
        language: `c` or `c++`.

    Raises:
        NoLibrary: There is no compiler, it refuses the source, or what it made cannot be loaded.
    """
    compiler = compiler_of(language)
    path = shutil.which(compiler[0])
    assert path is not None
    place = os.path.realpath(path)
    stated = [*compiler, place, str(os.stat(place).st_mtime_ns), *options, main]
    digest = hashlib.sha256("\0".join([*stated, *map("\0".join, sources.items())]).encode())
    name = f"{Path(main).stem}-{digest.hexdigest()[:24]}.so"
    with tempfile.TemporaryDirectory(prefix="graphopt-", ignore_cleanup_errors=True) as work:
        kept = _kept_in(Path(work)) / name
        if not kept.is_file():
            _compile([*compiler, *options], sources, main, Path(work), kept)
        try:
            return ctypes.CDLL(str(kept))
        except OSError as problem:
            raise NoLibrary(f"{kept.name} cannot be loaded: {_first_line(problem)}") from problem


def _kept_in(work: Path) -> Path:
    """Return the folder of this user's compiled libraries; a temporary one where none is written.

    What others may write to is not trusted: it is loaded.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "graphopt"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
            return work
        return folder if os.access(folder, os.W_OK) else work
    except OSError:
        return work


def _compile(
    command: Sequence[str], sources: Mapping[str, str], main: str, work: Path, kept: Path
) -> None:
    for name, text in sources.items():
        (work / name).write_text(text, encoding="utf-8")
    made = work / "made.so"
    whole = [*command, str(work / main), "-o", str(made)]
    try:
        done = subprocess.run(
            whole,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMPILE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise NoLibrary(f"{command[0]} does not compile it: {_first_line(problem)}") from problem
    if done.returncode:
        raise NoLibrary(f"{command[0]} does not compile it: {done.stderr.strip():.300}")
    try:
        # Under its own name at once or not at all: others may compile it at the same time.
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as beside:
            beside.write(made.read_bytes())
        os.chmod(beside.name, 0o700)
        os.replace(beside.name, kept)
    except OSError as problem:
        reason = f"{kept.parent} takes no file: {_first_line(problem)}"
        raise NoLibrary(f"what {command[0]} makes of it cannot be kept: {reason}") from problem


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).splitlines()), type(problem).__name__)
