"""The kernels for Hopper of few bits on the CPU: their sources, run by hopper_emulator.cpp."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_emulator import library

from graphopt.lowering.kernels.family import runtime_text

_SECTION = re.compile(r"// machine instructions -+\n.*?(?=\n// [\w ]+ -+\n)", re.DOTALL)


def emulate(
    files: Sequence[str],
    name: str,
    constants: Mapping[str, int],
    blocks: int,
    threads: int,
    shared: int,
    operands: ctypes.Structure,
) -> None:
    """Run a kernel under `runtime/kernels` on tensors in the host's memory.

    Args:
        files: Those of its source; the emulator's machine instructions are where the last of them
            has its own.
        constants: Macros in front of it.
    """
    texts = [runtime_text(f"kernels/{file}") for file in files]
    own = max(place for place, text in enumerate(texts) if _SECTION.search(text))
    for place, text in enumerate(texts):
        include = '#include "hopper_emulator.cpp"\n' if place == own else ""
        texts[place] = _SECTION.sub(include, text)
    defines = {"BF16": 1, **{key: int(value) for key, value in constants.items()}, "KERNEL": name}
    made = library("hopper_emulator.cpp", "".join(texts), tuple(defines.items()))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(operands))
    assert not made.run(blocks, threads, shared, pointers), "a block wrote behind its memory"


@dataclass(frozen=True)
class _Emulated:
    files: tuple[str, ...]
    name: str
    constants: tuple[tuple[str, int], ...]
    shared: int


def on_this_machine(monkeypatch: pytest.MonkeyPatch, launcher: ModuleType) -> None:
    """Let a module's kernels run on the CPU where there is no GPU that runs them."""
    if torch.cuda.is_available():
        return

    def kernel(
        files: tuple[str, ...], name: str, constants: Any, shared: int, device: Any, front: str = ""
    ) -> _Emulated:
        return _Emulated(files, name, constants, shared)

    def launch(
        kernel: _Emulated, grid: tuple[int], threads: int, operands: Any, device: Any, early: bool
    ) -> None:
        emulate(
            kernel.files, kernel.name, dict(kernel.constants), grid[0], threads, kernel.shared,
            operands,
        )  # fmt: skip

    monkeypatch.setattr(launcher, "runs_compiled", lambda device: True)
    monkeypatch.setattr(launcher, "kernel", kernel)
    monkeypatch.setattr(launcher, "launch", launch)
    monkeypatch.setattr(launcher, "cores_of", lambda device: 2, raising=False)
