"""Sizes as text: sums, products, small powers and a few functions of B, S and P."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import sympy

from graphopt.ir.types import SYMBOLS, Dim, dim

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Max": sympy.Max,
    "Min": sympy.Min,
    "Mod": sympy.Mod,
    "ceiling": sympy.ceiling,
    "floor": sympy.floor,
}
"""What a size may call, by name."""

_MAX_POWER = 16
_MAX_PARTS = 200
_MAX_NUMBER = 2**62


def parse_size(text: object) -> Dim:
    """Return the size written as `text`.

    Only sums, products, small powers and a few functions of B, S and P are built; sympy's own
    parser would evaluate the text as Python. Its parts are counted and its degree is bounded, since
    algebra on a power of powers takes for ever.

    Raises:
        ValueError: It is not such a text.
    """
    parts = 0

    def build(node: ast.expr) -> tuple[Any, int]:
        """Return the size and a bound of its degree."""
        nonlocal parts
        parts += 1
        if parts > _MAX_PARTS:
            raise ValueError("too long")
        size, degree = combine(node)
        if degree > _MAX_POWER or (size.is_number and abs(size) > _MAX_NUMBER):
            raise ValueError("too large")
        return size, degree

    def combine(node: ast.expr) -> tuple[Any, int]:
        match node:
            case ast.Constant(value=int() as value) if not isinstance(value, bool):
                return sympy.Integer(value), 0
            case ast.Name(id=name) if name in SYMBOLS:
                return SYMBOLS[name], 1
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                size, degree = build(inner)
                return -size, degree
            case ast.BinOp(left, ast.Pow(), ast.Constant(value=int() as power)):
                size, degree = build(left)
                if 0 <= power <= _MAX_POWER and degree * power <= _MAX_POWER:
                    return size**power, degree * power
            case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
                (first, a), (second, b) = build(left), build(right)
                degree = max(a, b) if isinstance(op, ast.Add | ast.Sub) else a + b
                return _OPERATORS[type(op)](first, second), degree
            case ast.Call(ast.Name(id=name), args, keywords=[]) if name in FUNCTIONS:
                built = [build(arg) for arg in args]
                if len(built) <= 8:
                    return FUNCTIONS[name](*(size for size, _ in built)), max(d for _, d in built)
        raise ValueError("not a size")

    try:
        if not isinstance(text, str) or len(text) > 10_000:
            raise ValueError("not a text")
        size, _ = build(ast.parse(text, mode="eval").body)
        if size.has(sympy.zoo, sympy.nan):
            raise ValueError("division by zero")
        return dim(size)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError("not a size") from error
