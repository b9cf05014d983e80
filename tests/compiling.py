"""Compiling in tests: kernels for GPUs that are not there, and functions by a backend of torch."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch


def compile_alone(script: str) -> str:
    """Return the error of a script run where kernels are compiled, "" if it ends well.

    The interpreter, which other tests run kernels by, takes what the compiler does not.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-"], input=script, text=True, capture_output=True,
        env=environment, check=False,
    )  # fmt: skip
    return "" if done.returncode == 0 else done.stderr or f"exit code {done.returncode}"


def with_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Let `graphopt.execute.compiled` compile by a backend of torch.compile, and from nothing.

    Args:
        backend: `aot_eager` runs the traced graph and its gradients by torch's own kernels, in a
            second; `inductor`, which is the default, generates and compiles new ones.
    """
    from graphopt.execute import compiled

    monkeypatch.setattr(compiled, "_made", {})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
