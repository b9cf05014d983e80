"""Tests that do not run every day call functions as they are.

A test that is exhaustive, or needs a GPU, is read by nobody for days: an argument that was renamed
would be found when it matters. Calls of helpers are held to their definitions, by the text of both.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SELDOM = re.compile(r"\bexhaustive|mark\.gpu\b")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def plain_functions(tree: ast.Module) -> dict[str, ast.arguments]:
    """Return the parameters of a module's functions, without those that a decorator may change."""
    return {
        node.name: node.args
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.decorator_list
    }


def helper_of(node: ast.AST) -> Path | None:
    """Return the module of the tests that a statement imports names from."""
    path = TESTS / f"{node.module}.py" if isinstance(node, ast.ImportFrom) else None
    return path if path is not None and path.is_file() else None


def known_functions(tree: ast.Module) -> dict[str, ast.arguments]:
    """Return the parameters of functions that a module defines or imports from a helper."""
    found = plain_functions(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (path := helper_of(node)):
            there = plain_functions(parsed(path))
            for name in node.names:
                if name.name in there:
                    found[name.asname or name.name] = there[name.name]
    return found


def misfit(call: ast.Call, takes: ast.arguments) -> str:
    """Return what is wrong with a call's arguments; "" where nothing is, or cannot be told."""
    positional = [one.arg for one in (*takes.posonlyargs, *takes.args)]
    named = {one.arg for one in (*takes.args, *takes.kwonlyargs)}
    given = {keyword.arg for keyword in call.keywords if keyword.arg}
    starred = any(isinstance(one, ast.Starred) for one in call.args)
    if takes.kwarg is None and (unknown := given - named):
        return f"has no {', '.join(sorted(unknown))}"
    if starred:
        return ""
    if takes.vararg is None and len(call.args) > len(positional):
        return f"takes {len(positional)} positional arguments and is given {len(call.args)}"
    if len(given) < len(call.keywords):
        return ""
    needed = set(positional[len(call.args) : len(positional) - len(takes.defaults)])
    pairs = zip(takes.kwonlyargs, takes.kw_defaults, strict=True)
    needed |= {one.arg for one, default in pairs if default is None}
    return f"is not given {', '.join(sorted(needed - given))}" if needed - given else ""


def misfits(tree: ast.Module) -> Iterator[str]:
    """Return what is wrong with a module's calls of functions that it knows by name."""
    functions = known_functions(tree)
    for part in tree.body:
        nodes = list(ast.walk(part))
        # What a parameter or a variable is called is another thing than the function.
        hidden = {node.arg for node in nodes if isinstance(node, ast.arg)}
        hidden |= {
            node.id
            for node in nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        hidden |= {node.name for node in nodes[1:] if isinstance(node, ast.FunctionDef)}
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                name = node.func.id
                if name in functions and name not in hidden:
                    if wrong := misfit(node, functions[name]):
                        yield f"line {node.lineno}: {name} {wrong}"


@pytest.mark.slow
def test_tests_that_seldom_run_call_functions_as_they_are() -> None:
    seldom = [p for p in TESTS.rglob("*.py") if SELDOM.search(p.read_text(encoding="utf-8"))]
    assert len(seldom) > 50
    found = [
        f"{path.relative_to(TESTS)}, {wrong}"
        for path in sorted(seldom)
        for wrong in misfits(parsed(path))
    ]
    assert found == []


def test_what_is_wrong_with_a_call_is_found() -> None:
    text = """
def f(a, b, c=1, *, d, e=2): ...
def g(a, **rest): ...
def h(*rest): ...
def given(f): f(1)
def hidden():
    f = g
    f(1)
def calls():
    {}
"""
    for call, wrong in {
        "f(1, 2, d=3)": [],
        "f(1, b=2, d=3, e=4)": [],
        "f(1, 2, d=3, old=4)": ["line 10: f has no old"],
        "f(1, d=3)": ["line 10: f is not given b"],
        "f(1, 2)": ["line 10: f is not given d"],
        "f(1, 2, 3, 4, d=5)": ["line 10: f takes 3 positional arguments and is given 4"],
        "f(*all, d=1)": [],
        "f(1, **all)": [],
        "f(*all, old=1)": ["line 10: f has no old"],
        "g(1, any=2)": [],
        "h(1, 2, 3)": [],
        "unknown(1)": [],
    }.items():
        assert list(misfits(ast.parse(text.format(call)))) == wrong, call
