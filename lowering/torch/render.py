"""The text of `model.py`: one file that runs a program with PyTorch alone."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Collection

from graphopt.ir.graph import Program
from graphopt.ir.shapes import infer_program
from graphopt.lowering.torch import template
from graphopt.lowering.torch.classes import ModuleClass
from graphopt.lowering.torch.model import ModelClass
from graphopt.lowering.torch.text import HELPERS, WIDTH, class_name, prose, quoted, wrap
from graphopt.lowering.torch.tiled import (
    TORCH_NAMES,
    TiledModel,
    lower_attentions,
    mask_is_for_attention_alone,
)
from graphopt.runtime import ops as runtime

_STANDARD = {
    "argparse": "import argparse",
    "importlib": "import importlib.util",
    "sys": "import sys",
    "Collection": "from collections.abc import Collection",
    "Path": "from pathlib import Path",
    "ModuleType": "from types import ModuleType",
    "Any": "from typing import Any",
}
_LIBRARIES = {
    "torch": "import torch",
    "F": "import torch.nn.functional as F",
    "safe_open": "from safetensors import safe_open",
    "Tensor": "from torch import Tensor, nn",
}


def render_model(program: Program, target: str = "cpu") -> str:
    """Return the text of `model.py` for a program on a target.

    It depends on nothing that `program.json` leaves out, nor on the dtype of a weight, which
    another emitter may change: a program that was saved gives the same text when it is loaded
    again. No weight is read.

    Raises:
        LoweringError: An op, an attribute or an input has no form in the file.
    """
    tiled = lower_attentions(program, target)
    classes = _classes(program)
    ahead = ("attention", "cached_attention") if tiled else ()
    unmasked = tiled is not None and mask_is_for_attention_alone(program)
    model = "\n".join(ModelClass(program, classes, unmasked=unmasked).lines())
    parts = ["\n".join(made.lines()) for made in classes.values()]
    if "under(" in model:
        parts.append(template.UNDER.strip())
    helpers = {name for made in classes.values() for name in made.body.helpers}
    body = [
        "# What the layers are made of.",
        *([template.kernels(tiled.device).strip()] if tiled else []),
        *_sources(helpers.difference(ahead)),
        "# The layers.",
        *parts,
        model,
        "# Loading and running.",
        template.load(tiled is not None).strip(),
        _generate(program, classes, unmasked).strip(),
        template.main(tiled is not None).strip(),
    ]
    text = "\n\n\n".join(body)
    head = [_docstring(program, tiled), "from __future__ import annotations"]
    head += [_imports(text, _STANDARD), _imports(text, _LIBRARIES)]
    head.append("\n".join(_names(program, text, tiled)))
    return "\n\n".join(head) + f"\n\n\n{text}\n"


def _generate(program: Program, classes: dict[str, ModuleClass], unmasked: bool) -> str:
    """Return `generate`: with a cache of fixed room where nothing asks how full it is."""
    if not program.states:
        return template.UNCACHED
    sizes = any("P" in made.body.needs for made in classes.values())
    return template.STATIC if unmasked and not sizes else template.CACHED


def _classes(program: Program) -> dict[str, ModuleClass]:
    """Return the class of every function that is called, in order of the first call."""
    per_call, _ = infer_program(program)
    classes: dict[str, ModuleClass] = {}
    taken = {"Model"}
    for name in dict.fromkeys(call.function for call in program.calls):
        function = program.functions[name]
        numbers = [n for n, call in enumerate(program.calls) if call.function == name]
        arguments = [[per_call[n][value] for value in function.params] for n in numbers]
        results = [[per_call[n][value] for value in function.results] for n in numbers]
        calls = [program.calls[n] for n in numbers]
        unique = class_name(name, taken)
        taken.add(unique)
        classes[name] = ModuleClass(unique, function, calls, arguments, results)
    return classes


def _sources(helpers: Collection[str]) -> list[str]:
    """Return the source of runtime functions and of those they call, callees first."""
    found: dict[str, str] = {}

    def visit(name: str) -> None:
        source = inspect.getsource(getattr(runtime, name)).strip()
        calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        called = {callee.id for callee in calls if isinstance(callee, ast.Name)}
        for other in HELPERS:
            if other in called and other != name and other not in found:
                visit(other)
        found[name] = source

    for name in HELPERS:
        if name in helpers and name not in found:
            visit(name)
    return list(found.values())


def _docstring(program: Program, tiled: TiledModel | None) -> str:
    where = "in plain PyTorch" if tiled is None else f"for {prose(tiled.target.title)}"
    about = f"{prose(program.name)}: a language model {where}, written by graphopt."
    origin = f"Made from {prose(program.source)}. " if program.source else ""
    needs = "torch and safetensors, and model.safetensors"
    if tiled is not None:
        needs = f"{', '.join(tiled.packages)}, and model.safetensors and kernels"
    rest = f"{origin}Needs {needs} beside this file."
    usage = """
    python model.py 1 2 3 --new 16

    from model import generate, load
    print(generate(load(), [1, 2, 3], count=16))
"""
    first, second = (textwrap.fill(text, WIDTH - 4) for text in (about, rest))
    return f'"""{first}\n\n{second}\n{usage}"""'


def _imports(text: str, statements: dict[str, str]) -> str:
    used = [line for name, line in statements.items() if re.search(rf"\b{name}\b", text)]
    return "\n".join(used)


def _names(program: Program, text: str, tiled: TiledModel | None) -> list[str]:
    """Return the definitions that stand above everything else."""
    lines = ["aten = torch.ops.aten"] if re.search(r"\baten\.", text) else []
    lines.append("KV = tuple[Tensor, Tensor]  # keys and values of a layer: [B,heads,tokens,size]")
    constants = ", ".join(quoted(weight.name) for weight in program.weights if weight.constant)
    lines += wrap(f"CONSTANTS: set[str] = {{{constants}}}" if constants else _NO_CONSTANTS, 0)
    if tiled is not None:
        lines.append(f"DTYPE = torch.{TORCH_NAMES[tiled.dtype]}  # what it computes in, on a GPU")
    lines.append(f"END: list[int] = {_end_tokens(program)}  # tokens that end a text")
    return lines


_NO_CONSTANTS = "CONSTANTS: set[str] = set()"


def _end_tokens(program: Program) -> list[int]:
    tokens = program.config.get("eos_token_id")
    tokens = tokens if isinstance(tokens, list) else [tokens]
    return [token for token in tokens if isinstance(token, int) and not isinstance(token, bool)]
