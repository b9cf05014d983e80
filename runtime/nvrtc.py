"""NVRTC, the CUDA compiler that is a library: from source to a cubin or to PTX."""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from graphopt.errors import LoweringError

# Packages of PyPI that hold the library, for CUDA 12 and later.
_PACKAGES = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")
_NAMES = ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so")
# The last that compiles for it: CUDA 13 dropped every architecture before 7.5.
_LAST = {"70": 12, "72": 12}


@dataclass(frozen=True)
class Compiled:
    """What came out of a compilation.

    Attributes:
        arch: What it was compiled for.
        cubin: Machine code, where `arch` is a real architecture such as `sm_70`, else None.
        ptx: Text, from which a driver compiles for newer architectures; that of a real one is
            that of its virtual one.
        log: What the compiler said; for machine code the registers and spills of each kernel.
    """

    arch: str
    cubin: bytes | None
    ptx: str
    log: str

    @property
    def image(self) -> bytes:
        """What the driver loads; PTX ends with a zero byte."""
        if self.cubin is not None:
            return self.cubin
        return self.ptx.encode() + b"\0"


def compile_cuda(
    source: str, name: str, arch: str, defines: Mapping[str, int | float | str]
) -> Compiled:
    """Compile CUDA C++ that includes nothing.

    Args:
        source: The text of the file.
        name: What messages call it.
        arch: `sm_*` for machine code, `compute_*` for PTX.
        defines: Macros by name; a float becomes a float literal.

    Raises:
        LoweringError: There is no NVRTC, it is too new for `arch`, or the source does not
            compile; then the message has the compiler's log.
    """
    number = arch.split("_")[-1].rstrip("af")
    nvrtc = _library(_LAST.get(number))
    options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device"]
    if arch.startswith("sm_"):
        options.append("--ptxas-options=-v")
    options += [f"-D{key}={macro(value)}" for key, value in defines.items()]
    program = ctypes.c_void_p()
    _check(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), 0, None, None
        ),
    )
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
        log = _text(nvrtc, program, "ProgramLog")
        if status:
            raise LoweringError(
                f"{name} does not compile for {arch}: {_message(nvrtc, status)}.\n{log}",
                "The constants it was compiled with are: "
                + ", ".join(f"{key}={value}" for key, value in defines.items())
                + ".",
            )
        cubin = _bytes(nvrtc, program, "CUBIN") if arch.startswith("sm_") else None
        return Compiled(arch, cubin, _text(nvrtc, program, "PTX"), log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def nvrtc_version(at_most: int | None = None) -> tuple[int, int]:
    """Return the version of NVRTC that is used, as of the CUDA toolkit.

    Args:
        at_most: The newest major version that will do.

    Raises:
        LoweringError: There is none.
    """
    return _version(_library(at_most))


def macro(value: int | float | str) -> str:
    """Return a constant as the text of a macro."""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value!r}f" if isinstance(value, float) else str(value)


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        raise LoweringError(f"NVRTC failed: {_message(nvrtc, status)}.", "")


def _message(nvrtc: ctypes.CDLL, status: int) -> str:
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return bytes(nvrtc.nvrtcGetErrorString(status)).decode()


def _bytes(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    return _bytes(nvrtc, program, what).rstrip(b"\0").decode()


def _version(nvrtc: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _candidates() -> Iterator[str]:
    """Yield where the library may be: in the packages of PyPI, then where the system looks."""
    for package in _PACKAGES:
        try:
            files = importlib.metadata.files(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files or ():
            # Not the library's parts (`libnvrtc-builtins`, `.alt`), which it loads by itself.
            if file.name.startswith("libnvrtc.so"):
                path = Path(str(file.locate()))
                if path.is_file():
                    yield str(path)
    yield from _NAMES


@cache
def _library(at_most: int | None) -> ctypes.CDLL:
    """Load the first NVRTC whose major version is from 12 to `at_most`."""
    newer: tuple[int, int] | None = None
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        version = _version(library)
        if version[0] >= 12 and (at_most is None or version[0] <= at_most):
            return library
        newer = version
    if newer is not None and at_most is not None and newer[0] > at_most:
        raise LoweringError(
            f"NVRTC {newer[0]}.{newer[1]} no longer compiles for this architecture: CUDA "
            f"{at_most} was the last that did.",
            "Install it beside: pip install 'graphopt[cuda]'.",
        )
    raise LoweringError(
        "NVRTC, the CUDA compiler, is not installed.",
        "Install it with: pip install 'graphopt[cuda]'.",
    )
