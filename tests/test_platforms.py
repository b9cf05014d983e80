"""Machines without what Linux alone has: every module is imported there, and a model compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny

PROGRAM = r"""
import importlib
import os
import pkgutil
import sys
import types

# What graphopt is built on has ways of its own for every platform: it is imported as it is.
import contextlib
with contextlib.suppress(ImportError):
    import psutil  # which transformers reads where it is there
import huggingface_hub, onnx, onnx_ir, onnxruntime, torch, transformers
import torch._inductor.config, torch.export
from transformers import AutoModelForCausalLM, AutoTokenizer

# Python removes folders by descriptors where the system has them, which Windows has not.
import shutil
shutil._use_fd_functions = False

ABSENT = (
    "curses", "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty",
)
for name in ABSENT:
    sys.modules[name] = None
for name in ("fork", "geteuid", "getuid", "killpg", "mkfifo", "pread", "sched_getaffinity",
             "sysconf", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY"):
    if hasattr(os, name):
        delattr(os, name)
locked = []
windows = types.ModuleType("msvcrt")
windows.LK_NBLCK = 2
windows.locking = lambda file, mode, count: locked.append((mode, count))
sys.modules["msvcrt"] = windows

import graphopt

# Kernels are run by Triton alone, and imported with a model.
skipped = tuple(
    "graphopt.runtime." + name for name in ("kernels", "triton_attention", "fused", "moe", "ascend")
)
names = [item.name for item in pkgutil.walk_packages(graphopt.__path__, "graphopt.")]
assert len(names) > 200
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "kvpress" and name == "graphopt.integrations.kvpress_press":
            continue  # it is of use where kvpress is alone
        assert missing == "triton" and name.startswith(skipped), (name, error)

from typer.testing import CliRunner

from graphopt.cli.commands import app

for command in (
    ["compile", sys.argv[1], "-o", "out", "--emit", "torch,onnx", "--passes",
     "prune-blocks{remove=[0]}"],
    ["eval", "out", "--text", sys.argv[2], "--seqlen", "16", "--windows", "1"],
    ["generate", "out", "--prompt", "hi", "--max-new-tokens", "2"],
    ["targets"],
):
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (command, done.output)
assert locked == [(2, 1)] and not any(sys.modules[name] for name in ABSENT)
assert sorted(os.listdir()) == ["out"]
"""


@pytest.mark.slow
def test_nothing_needs_a_module_that_windows_lacks(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 20)
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", PROGRAM, str(model), str(text)]
    done = subprocess.run(
        command,
        cwd=tmp_path / "work",
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "USERNAME": "user"},  # as Windows has it; torch asks for it
    )
    assert done.returncode == 0, done.stderr
