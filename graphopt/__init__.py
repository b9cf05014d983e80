"""graphopt: a compiler-style graph transformation toolkit for large language models.

import graphopt as go

program = go.capture("demo")
program, report = go.Pipeline.parse("canonicalise,insert-kv-cache").run(program)
go.emit(program, "out", emit=("onnx",))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.capture import capture
    from graphopt.compiler import CompileOptions, compile_model, emit
    from graphopt.errors import GraphoptError
    from graphopt.ir import Program
    from graphopt.pass_manager.contract import Context, Pass, PassResult, Skip, register_pass
    from graphopt.pass_manager.pipeline import Pipeline
    from graphopt.pass_manager.run_options import RunOptions
    from graphopt.sources import open_model

__version__ = "0.1.0"

_HOMES = {
    "CompileOptions": "graphopt.compiler",
    "Context": "graphopt.pass_manager.contract",
    "GraphoptError": "graphopt.errors",
    "Pass": "graphopt.pass_manager.contract",
    "PassResult": "graphopt.pass_manager.contract",
    "Pipeline": "graphopt.pass_manager.pipeline",
    "Program": "graphopt.ir",
    "RunOptions": "graphopt.pass_manager.run_options",
    "Skip": "graphopt.pass_manager.contract",
    "capture": "graphopt.capture",
    "compile_model": "graphopt.compiler",
    "emit": "graphopt.compiler",
    "open_model": "graphopt.sources",
    "register_pass": "graphopt.pass_manager.contract",
}

__all__ = [
    "CompileOptions",
    "Context",
    "GraphoptError",
    "Pass",
    "PassResult",
    "Pipeline",
    "Program",
    "RunOptions",
    "Skip",
    "capture",
    "compile_model",
    "emit",
    "open_model",
    "register_pass",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch takes seconds, which `graphopt --help` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
