"""The Volta kernels on the CPU: their source, run by volta_emulator.cpp."""

from __future__ import annotations

import functools
import re

from cuda_emulator import COMPILER, library

from graphopt.lowering.kernels.volta_cuda import volta_source
from graphopt.runtime.driver import Kernel
from graphopt.runtime.volta import DECODE, DEFINES, MERGE, MERGE_THREADS, PREFILL, shared_bytes

__all__ = ["COMPILER", "emulated", "place"]


def _defines(constants):
    return tuple(
        (key, f"{constants[key]}f" if key == "SOFTCAP" else int(constants[key])) for key in DEFINES
    )


@functools.cache
def _library(defines, source):
    section = r"// -+ machine instructions -+\n.*?(?=// -+ sizes -+\n)"
    source, replaced = re.subn(section, "", source or volta_source(), flags=re.DOTALL)
    assert replaced == 1
    return library("volta_emulator.cpp", source, defines)


class EmulatedKernel(Kernel):
    """A kernel that runs on the CPU."""

    def __init__(self, library, number, name, parameters, threads, shared):
        super().__init__(b"", name, parameters, threads=threads, shared=shared)
        self._run = functools.partial(library.run, number)

    def start(self, grid, pointers, tensors):
        x, y, z = (*grid, 1, 1)[:3]
        wrote_behind = self._run(x, y, z, self.threads, self.shared, pointers)
        assert not wrote_behind, "a block wrote behind its shared memory"


def emulated(constants, source=None):
    """Return the kernels of some constants: prefill's one, or decode's two.

    Args:
        source: Instead of the one in the package.
    """
    threads, shared = 32 * constants["WARPS"], shared_bytes(constants)
    library = _library(_defines(constants), source)
    if not constants["DECODE"]:
        return EmulatedKernel(library, 0, "attention_prefill", PREFILL, threads, shared)
    return (
        EmulatedKernel(library, 0, "attention_decode", DECODE, threads, shared),
        EmulatedKernel(library, 1, "attention_merge", MERGE, MERGE_THREADS, 0),
    )


def place(constants, which, row, chunk):
    """Return the byte at which a chunk of a row of K (`which` 0) or of V (1) lies."""
    return _library(_defines(constants), None).place_of(which, row, chunk)
