"""Kernels compiled for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys


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
