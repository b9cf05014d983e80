"""The head of `model.py`: what it is, what it imports, and the names above everything else."""

from __future__ import annotations

import json
import re
import textwrap

from graphopt.ir.context import position_table
from graphopt.ir.dataflow import used_ops
from graphopt.ir.graph import Program
from graphopt.ir.ops import is_aten
from graphopt.ir.ranks import group_of
from graphopt.lowering.torch.lowered_kernels import TORCH_NAMES, LoweredKernels
from graphopt.lowering.torch.sees import Sees
from graphopt.lowering.torch.text import WIDTH, prose, quoted, wrap
from graphopt.runtime import chat
from graphopt.sources.generation import GenerationSettings

_STANDARD = {
    "argparse": "import argparse",
    "contextlib": "import contextlib",
    "importlib": "import importlib.util",
    "inspect": "import inspect",
    "json": "import json",
    "os": "import os",
    "re": "import re",
    "subprocess": "import subprocess",
    "sys": "import sys",
    "Iterator": "from collections.abc import Collection, Iterator, Mapping, Sequence",
    "datetime": "from datetime import datetime",
    "Path": "from pathlib import Path",
    "ModuleType": "from types import ModuleType",
    "Any": "from typing import Any",
}
_LIBRARIES = {
    "torch": "import torch",
    "dist": "import torch.distributed as dist",
    "F": "import torch.nn.functional as F",
    "safe_open": "from safetensors import safe_open",
    "Tensor": "from torch import Tensor, nn",
}


def head_text(program: Program, text: str, kernels: LoweredKernels | None) -> str:
    """Return what stands above the rest of the file.

    Args:
        text: The rest, of which it is seen what has to be imported.
    """
    head = [_docstring(program, kernels), "from __future__ import annotations"]
    head += [_imports(text, _STANDARD), _imports(text, _LIBRARIES)]
    head.append("\n".join(_names(program, text, kernels)))
    return "\n\n".join(head)


# What the host has to know before the next kernel can be started.
_HOST = ("grouped_mm_fallback", "nonzero", "item", "masked_select", "bincount")


def _recordable(program: Program) -> bool:
    """Return whether a step is the same kernels each time, so that a CUDA graph can hold it."""
    return not any(is_aten(op) and op.split(".")[1] in _HOST for op in used_ops(program))


def _docstring(program: Program, kernels: LoweredKernels | None) -> str:
    where = "in plain PyTorch" if kernels is None else f"for {prose(kernels.target.title)}"
    about = f"{prose(program.name)}: a language model {where}, written by graphopt."
    origin = f"Made from {prose(program.source)}. " if program.source else ""
    needs = "torch and safetensors, and model.safetensors"
    if kernels is not None:
        needs = f"{', '.join(kernels.packages)}, and model.safetensors and kernels"
    elif any(state.policy for state in program.states.values()):
        needs += " and policies"
    sees = Sees.of(program) is not None
    start, count = "python", len(group_of(program))
    if count:
        needs += " and ranks"
        start = f"torchrun --nproc-per-node {count}"
    prompts = "--prompt needs tokenizers, and jinja2 where the model has a chat template."
    pictures = " --image needs transformers, pillow and the whole folder." if sees else ""
    rest = f"{origin}Needs {needs} beside this file. {prompts}{pictures}"
    shown = f'    {start} model.py --prompt "What is in the picture?" --image picture.png\n'
    usage = f"""
    {start} model.py --prompt "What is the capital of France?"
{shown if sees else ""}    {start} model.py 1 2 3 --new 16

    from model import generate, load
    print(generate(load(), [1, 2, 3], count=16))
"""
    first, second = (textwrap.fill(text, WIDTH - 4) for text in (about, rest))
    return f'"""{first}\n\n{second}\n{usage}"""'


def _imports(text: str, statements: dict[str, str]) -> str:
    used = [line for name, line in statements.items() if re.search(rf"\b{name}\b", text)]
    return "\n".join(used)


def _names(program: Program, text: str, kernels: LoweredKernels | None) -> list[str]:
    """Return the definitions that stand above everything else."""
    lines = ["aten = torch.ops.aten"] if re.search(r"\baten\.", text) else []
    lines.append("KV = tuple[Tensor, Tensor]  # keys and values of a layer: [B,heads,tokens,size]")
    constants = ", ".join(quoted(weight.name) for weight in program.weights if weight.constant)
    lines += wrap(f"CONSTANTS: set[str] = {{{constants}}}" if constants else _NO_CONSTANTS, 0)
    if kernels is not None:
        lines.append(f"DTYPE = torch.{TORCH_NAMES[kernels.dtype]}  # what it computes in, on a GPU")
    ends = list(GenerationSettings.of(program.config, program.generation).eos_token_id)
    about, end = "tokens that end a text", f"END: list[int] = {ends}"
    if len(end) + 4 + len(about) <= WIDTH:
        lines.append(f"{end}  # {about}")
    else:
        lines += [f"# {about.capitalize()}.", *wrap(end, 0)]
    limits = json.dumps(chat.CHAT_LIMITS)
    lines.append(f"CHAT_LIMITS = {limits}  # of a chat template")
    table = position_table(program)
    rows = None if table is None else table[1]
    lines.append(f"POSITIONS: int | None = {rows}  # rows of its table of positions, if it has one")
    if "RECORDS" in text:
        why = "a step is the same kernels each time"
        lines.append(
            f"RECORDS = {_recordable(program)}  # whether {why}, so that a graph can hold it"
        )
    return lines


_NO_CONSTANTS = "CONSTANTS: set[str] = set()"
