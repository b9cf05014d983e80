"""Kernels in CUDA C++ on the CPU: their source behind machine instructions of cuda_emulator.h."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

COMPILER = shutil.which("g++")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="graphopt-cuda-")


@functools.cache
def library(emulator: str, source: str, defines: tuple[tuple[str, object], ...]) -> ctypes.CDLL:
    """Return a kernel as a library of the CPU.

    Args:
        emulator: The file beside this one that has machine instructions and includes the source.
        source: The kernel's, without its own machine instructions.
        defines: Macros by name.
    """
    assert COMPILER is not None
    here, folder = Path(__file__).parent, Path(_folder().name)
    stem = str(abs(hash((emulator, source, defines))))
    (folder / f"{stem}.cu").write_text(source)
    made = folder / f"{stem}.so"
    command = [
        COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off",
        "-U_FORTIFY_SOURCE",  # a checked longjmp knows one stack only
        f"-I{here}", f'-DKERNEL_SOURCE="{folder / stem}.cu"',
        *(f"-D{name}={value}" for name, value in defines), "-o", str(made), str(here / emulator),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(made))
