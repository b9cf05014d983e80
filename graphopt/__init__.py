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
    from graphopt.errors import GraphoptError, PassError
    from graphopt.ir import Array, Call, Function, Node, Param, Program, Type, Value, Weight
    from graphopt.pass_manager.contract import Context, Pass, PassResult, Skip, register_pass
    from graphopt.pass_manager.pipeline import Pipeline
    from graphopt.pass_manager.run_options import RunOptions
    from graphopt.sources import open_model

__version__ = "0.1.0"

_HOMES = {
    "Array": "graphopt.ir",
    "Call": "graphopt.ir",
    "CompileOptions": "graphopt.compiler",
    "Context": "graphopt.pass_manager.contract",
    "Function": "graphopt.ir",
    "GraphoptError": "graphopt.errors",
    "Node": "graphopt.ir",
    "Param": "graphopt.ir",
    "Pass": "graphopt.pass_manager.contract",
    "PassError": "graphopt.errors",
    "PassResult": "graphopt.pass_manager.contract",
    "Pipeline": "graphopt.pass_manager.pipeline",
    "Program": "graphopt.ir",
    "RunOptions": "graphopt.pass_manager.run_options",
    "Skip": "graphopt.pass_manager.contract",
    "Type": "graphopt.ir",
    "Value": "graphopt.ir",
    "Weight": "graphopt.ir",
    "capture": "graphopt.capture",
    "compile_model": "graphopt.compiler",
    "emit": "graphopt.compiler",
    "open_model": "graphopt.sources",
    "register_pass": "graphopt.pass_manager.contract",
}

__all__ = [
    "Array",
    "Call",
    "CompileOptions",
    "Context",
    "Function",
    "GraphoptError",
    "Node",
    "Param",
    "Pass",
    "PassError",
    "PassResult",
    "Pipeline",
    "Program",
    "RunOptions",
    "Skip",
    "Type",
    "Value",
    "Weight",
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


def __dir__() -> list[str]:
    """List what is imported when it is asked for as well."""
    return sorted({*globals(), *__all__})
