"""Questions about the syntax trees of kernels' sources."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

Constants = Mapping[str, Any]
Function = ast.FunctionDef

WIDTH = 100
# Calls without effect, of `tl` and of Python: an assignment of one that nobody reads can go.
_PURE = {"arange", "cdiv", "full", "load", "max", "maximum", "min", "minimum", "num_programs",
         "program_id", "to", "where", "zeros"}  # fmt: skip


@functools.lru_cache(maxsize=256)
def parsed(text: str) -> ast.Module:
    """Return the tree of a text, which nobody changes."""
    return ast.parse(text)


@functools.lru_cache(maxsize=256)
def names_read(text: str) -> Counter[str]:
    """Return how often each name is read in a text; what is imported under another, too."""
    statements = [each for each in parsed(text).body if not isinstance(each, Function)]
    nodes = [node for _, inside in functions_of(text) for node in inside]
    nodes += [node for each in statements for node in ast.walk(each)]
    found = Counter(n.id for n in nodes if isinstance(n, ast.Name) and not is_store(n))
    found.update(n.name for n in nodes if isinstance(n, ast.alias) and n.asname is not None)
    return found


@functools.lru_cache(maxsize=256)
def functions_of(text: str) -> list[tuple[Function, list[ast.AST]]]:
    """Return the functions of a text, each with all its nodes."""
    return [(f, list(ast.walk(f))) for f in parsed(text).body if isinstance(f, Function)]


@functools.lru_cache(maxsize=256)
def calls_of(text: str) -> dict[str, list[tuple[Function, ast.Call]]]:
    """Return by the name of what they call the calls in a text, each with the function around."""
    found: dict[str, list[tuple[Function, ast.Call]]] = {}
    for function, nodes in functions_of(text):
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found.setdefault(node.func.id, []).append((function, node))
    return found


@functools.lru_cache(maxsize=256)
def constants_of(text: str) -> dict[str, set[str]]:
    """Return by function the parameters that Triton takes as constants and nothing assigns to."""
    found = {}
    for function, nodes in functions_of(text):
        constant = {
            arg.arg
            for arg in function.args.args
            if arg.annotation is not None and "constexpr" in ast.unparse(arg.annotation)
        }
        found[function.name] = constant - {
            node.id for node in nodes if isinstance(node, ast.Name) and is_store(node)
        }
    return found


def arguments_of(function: Function, call: ast.Call) -> dict[str, ast.expr] | None:
    """Return the arguments of a call by parameter; None where that is not plain to see."""
    if any(isinstance(arg, ast.Starred) for arg in call.args):
        return None
    given = dict(zip(parameters_of(function), call.args, strict=False))
    for keyword in call.keywords:
        if keyword.arg is None:
            return None
        given[keyword.arg] = keyword.value
    return given


def parameters_of(function: Function) -> list[str]:
    return [arg.arg for arg in function.args.args]


def name_of(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def is_store(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def is_pure(node: ast.expr) -> bool:
    """Return whether an expression has no effect but its value."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            called = part.func.attr if isinstance(part.func, ast.Attribute) else name_of(part.func)
            if called not in _PURE:
                return False
        elif isinstance(part, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            return False
    return True
