"""Kernels in CUDA C++ that the machine that runs a model compiles, as it does those in Triton.

NVRTC comes with torch. A kernel is compiled for the GPU at hand when it is first asked for, in
half a second, and kept while the process lives.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from graphopt.errors import LoweringError
from graphopt.runtime.driver import DriverError, Function, Module
from graphopt.runtime.nvrtc import compile_cuda

HOPPER = (9, 0)
"""Compute capability of the GPUs that these kernels are written for."""

ACTIVATIONS = (
    "silu", "sigmoid", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "tanh",
)  # fmt: skip
"""Of gates, in the order of kernels/activations.cu."""

Constants = tuple[tuple[str, int], ...]


@functools.cache
def runs_compiled(device: torch.device) -> bool:
    """Return whether a device is a GPU that kernels in CUDA C++ are written for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER


def _text(name: str) -> str:
    """Return a kernel's source: it lies in `kernels` here, and beside this file in a model."""
    here = Path(__file__).parent
    beside = here / name
    return (beside if beside.is_file() else here / "kernels" / name).read_text(encoding="utf-8")


@functools.cache
def kernel(
    files: tuple[str, ...],
    name: str,
    constants: Constants,
    shared: int,
    device: torch.device,
    front: str = "",
) -> Function | None:
    """Return a kernel, compiled for the GPU at hand; None where that fails, which is said once.

    Args:
        files: Under `kernels`, the last with the kernel itself.
        constants: Macros in front of their text, by name.
        shared: Bytes of dynamic shared memory of a block.
        front: What stands between the constants and the text.
    """
    file, text = files[-1], "".join(map(_text, files))
    defines = "".join(f"#define {key} {value}\n" for key, value in constants)
    major, minor = torch.cuda.get_device_capability(device)
    try:
        with torch.cuda.device(device):
            made = compile_cuda(defines + front + text, file, f"sm_{major}{minor}a", {})
            return Module(made.image, file).function(name, shared)
    except (LoweringError, DriverError) as error:
        say_instead(file, str(error).rstrip("."))
        return None


@functools.cache
def say_instead(file: str, why: str) -> None:
    """Warn, once for each reason, that kernels in Triton run in place of that of a file."""
    warnings.warn(f"{why}: kernels in Triton run instead of {file}", stacklevel=3)


def constants_of(values: Mapping[str, int]) -> Constants:
    """Return constants as what a kernel is known by."""
    return tuple(sorted((name, int(value)) for name, value in values.items()))


def launch(
    function: Function,
    grid: tuple[int, ...],
    threads: int,
    operands: ctypes.Structure,
    device: torch.device,
    early: bool,
) -> None:
    """Start a kernel that takes one struct on torch's current stream of a device.

    Raises:
        DriverError: It could not be started.
    """
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(operands))
    if device.index in (None, torch.cuda.current_device()):
        function.launch(grid, threads, pointers, early)
        return
    with torch.cuda.device(device):
        function.launch(grid, threads, pointers, early)
