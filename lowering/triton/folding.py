"""What constants decide in the source of a kernel: values, and branches that are taken."""

from __future__ import annotations

import ast
import operator
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from graphopt.lowering.triton.source_text import reflowed, replace_lines
from graphopt.lowering.triton.syntax import Constants, Function

_OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.USub: operator.neg,
}  # fmt: skip


class Unknown(Exception):
    """A value that hangs on more than constants."""


def shared_constants(constants: Iterator[Constants]) -> dict[str, Any]:
    """Return what is the same in all; True and 1 are not."""
    first, *rest = constants
    return {
        name: value
        for name, value in first.items()
        if all(name in other and repr(other[name]) == repr(value) for other in rest)
    }


def evaluate(node: ast.expr, known: Constants) -> Any:
    """Return the value of an expression over constants.

    Raises:
        Unknown: It hangs on more than them.
    """
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return node.value
        case ast.Name() if node.id in known:
            return known[node.id]
        case ast.UnaryOp() if type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](evaluate(node.operand, known))
        case ast.BinOp() if type(node.op) in _OPERATIONS:
            return _calculate(node.op, node.left, node.right, known)
        case ast.Compare(ops=[op]) if type(op) in _OPERATIONS:
            return _calculate(op, node.left, node.comparators[0], known)
        case ast.UnaryOp(op=ast.Not()):
            return not _holds(node.operand, known)
    raise Unknown


def _calculate(op: ast.AST, left: ast.expr, right: ast.expr, known: Constants) -> Any:
    try:
        return _OPERATIONS[type(op)](evaluate(left, known), evaluate(right, known))
    except ZeroDivisionError:
        raise Unknown from None


def _holds(test: ast.expr, known: Constants) -> bool:
    """Return whether a condition holds; `and` and `or` where that is known whatever the rest is.

    Raises:
        Unknown: It hangs on more than constants.
    """
    if not isinstance(test, ast.BoolOp):
        return bool(evaluate(test, known))
    ends = isinstance(test.op, ast.Or)
    unknown = False
    for value in test.values:
        try:
            if _holds(value, known) == ends:
                return ends
        except Unknown:
            unknown = True
    if unknown:
        raise Unknown
    return not ends


def folded_statement(
    text: str, function: Function, node: ast.If, known: Constants, gone: set[ast.stmt]
) -> str | None:
    """Return the text with an `if` without the branches that are never taken, if there are any.

    Args:
        gone: The function's statements that the text no longer has: see `replace_lines`.
    """
    lines = text.split("\n")
    branches = _branches(lines, node)
    if branches is None:
        return None
    kept: list[tuple[list[str], list[str]]] = []
    for header, test, suite in branches:
        try:
            taken = test is None or _holds(test, known)
        except Unknown:
            kept.append((header, suite))
            continue
        if taken:
            kept.append(([], suite))
            break
    if len(kept) == len(branches) and all(
        bool(header) == (test is not None)
        for (header, _), (_, test, _) in zip(kept, branches, strict=True)
    ):
        return None
    if any(isinstance(n, ast.Constant) and n.lineno != n.end_lineno for n in ast.walk(node)):
        return None  # a string over several lines cannot move to the left
    indent = " " * node.col_offset
    made: list[str] = []
    for number, (header, suite) in enumerate(kept):
        if number == 0 and not header:
            made = reflowed(textwrap.dedent("\n".join(suite)), indent)
            if [line.strip() for line in made] == ["pass"]:  # what was in it went before
                made = []
        elif not header:
            made += [f"{indent}else:", *suite]
        else:
            keyword = "if" if number == 0 else "elif"
            made += [re.sub(r"^(\s*)(?:el)?if\b", rf"\1{keyword}", header[0]), *header[1:], *suite]
    replace_lines(lines, function, node, made, gone)
    return "\n".join(lines)


def _branches(
    lines: list[str], node: ast.If
) -> list[tuple[list[str], ast.expr | None, list[str]]] | None:
    """Return header, test and lines of each branch; None where the layout is another."""
    found: list[tuple[list[str], ast.expr | None, list[str]]] = []
    chain, start = node, node.lineno - 1
    if not lines[start].lstrip().startswith("if "):
        return None  # an `elif`, which goes with its `if`
    while True:
        assert chain.test.end_lineno is not None and chain.end_lineno is not None
        colon = chain.test.end_lineno - 1
        while not re.search(r":\s*(#.*)?$", lines[colon]):
            colon += 1
            if colon >= chain.body[0].lineno - 1:
                return None  # on one line
        end = chain.body[-1].end_lineno
        assert end is not None
        following = chain.orelse[0] if chain.orelse else None
        if following is None:
            found.append(
                (lines[start : colon + 1], chain.test, lines[colon + 1 : chain.end_lineno])
            )
            return found
        elif_line = lines[following.lineno - 1].lstrip().startswith("elif ")
        stop = following.lineno - 1
        while not elif_line and lines[stop].strip() != "else:":
            stop -= 1
            if stop < end:
                return None
        found.append((lines[start : colon + 1], chain.test, lines[colon + 1 : stop]))
        if not elif_line:
            found.append((lines[stop : stop + 1], None, lines[stop + 1 : chain.end_lineno]))
            return found
        assert isinstance(following, ast.If)
        chain, start = following, stop


def folded_expression(
    text: str, function: Function, node: ast.IfExp, known: Constants
) -> str | None:
    """Return the text with a conditional expression replaced by the side that is always taken."""
    try:
        side = node.body if _holds(node.test, known) else node.orelse
    except Unknown:
        return None
    statement = _statement_of(function, node)
    if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.Return | ast.For):
        return None
    # Elsewhere its neighbours may bind closer than what it is replaced by.
    alone = node is getattr(statement, "value", None)
    argument = any(isinstance(part, ast.Call) and node in part.args for part in ast.walk(statement))
    if node.lineno != node.end_lineno or not (alone or argument):
        return None
    lines = text.split("\n")
    line = lines[node.lineno - 1]
    made = line[side.col_offset : side.end_col_offset]
    lines[node.lineno - 1] = line[: node.col_offset] + made + line[node.end_col_offset :]
    return "\n".join(lines)


def _statement_of(function: Function, node: ast.AST) -> ast.stmt | None:
    """Return the innermost statement around a node."""
    around = [
        statement
        for statement in ast.walk(function)
        if isinstance(statement, ast.stmt) and any(part is node for part in ast.walk(statement))
    ]
    return around[-1] if around else None
