"""Whether an operator outside attention lets one token's result depend on another token.

Such an operator needs a state to compute a step of new tokens alone. What it does is found out by
running it on a few small tensors in which one token is changed, since there are too many operators
for a list of what each does along which axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.aten import concretize
from graphopt.ir.ops.base import Attrs
from graphopt.ir.types import B, Dim, P, S, Type, evaluate

_SIZES = {B: 2, S: 5, P: 0}
_MOST_NUMBERS = 1 << 22
"""Numbers of an operand that is still drawn; larger ones are tables and weights."""

_SHAPES = frozenset(
    {"reshape", "view", "_unsafe_view", "flatten", "unflatten", "expand", "expand_as",
     "broadcast_to", "squeeze", "unsqueeze", "clone", "contiguous", "copy", "alias", "detach"}
)  # fmt: skip
"""Every element is one of the input's own, and the order of tokens stays."""

_SLICES = frozenset({"slice", "narrow", "select", "tensor_split", "split", "split_with_sizes"})
_ARITHMETIC = frozenset(
    {"add", "sub", "mul", "div", "pow", "rsub", "remainder", "floor_divide", "fmod", "clamp",
     "clamp_min", "clamp_max", "masked_fill", "where"}
)  # fmt: skip
_CONTRACTED: Mapping[str, tuple[int, int]] = {
    "matmul": (0, -1), "mm": (0, -1), "bmm": (0, -1), "mv": (0, -1), "dot": (0, -1),
    "linear": (0, -1), "addmm": (1, -1), "baddbmm": (1, -1),
}  # fmt: skip
"""Products: the operand, and its axis, that the sum runs over."""


def mixes_tokens(node: Node, attrs: Attrs, types: Mapping[Value, Type]) -> bool:
    """Return whether a node's result for a token depends on other tokens, or on their number.

    Axes of size S, or S and a number, are those of tokens. Axes on which tokens of all sequences
    lie behind one another (B S) are taken for what a mixture of experts sorts and puts back.

    Args:
        attrs: The node's attributes in one call.
        types: In that call.
    """
    if not is_aten(node.op):
        return False
    name = node.op.split(".")[1]
    if name in _SHAPES or name == "embedding":
        return False
    if _counts_tokens(node, name, attrs, types):
        return True
    operands = [value for value in node.inputs if value is not None]
    places = [(v, axis) for v in operands for axis in _token_axes(types[v])]
    if not places:
        return False
    if name in _CONTRACTED:
        index, axis = _CONTRACTED[name]
        contracted = node.inputs[index]
        return contracted is not None and _is_tokens(types[contracted].shape[axis])
    if any(_numbers(types[v]) > _MOST_NUMBERS for v in operands):
        return name not in _ARITHMETIC and name not in ("index", "index_select", "gather")
    return any(_depends(node, attrs, types, value, axis) for value, axis in places)


def _is_tokens(size: Dim) -> bool:
    return isinstance(size, sympy.Expr) and S in size.free_symbols and B not in size.free_symbols


def _token_axes(kind: Type) -> list[int]:
    return [axis for axis, size in enumerate(kind.shape) if _is_tokens(size)]


def _numbers(kind: Type) -> int:
    total = 1
    for size in kind.shape:
        total *= evaluate(size, _SIZES)
    return total


def _counts_tokens(node: Node, name: str, attrs: Attrs, types: Mapping[Value, Type]) -> bool:
    """True where S is an operand of arithmetic, the end of a count or of a piece of a table."""

    def leaves(item: Any) -> Iterator[Any]:
        if isinstance(item, list | tuple):
            for inner in item:
                yield from leaves(inner)
        else:
            yield item

    given = [*leaves(attrs["args"]), *attrs.get("kwargs", {}).values()]
    by_length = any(isinstance(x, sympy.Expr) and _is_tokens(x) for x in given)
    if name in _SLICES:
        source = node.inputs[0]
        return by_length and source is not None and not _token_axes(types[source])
    return by_length and (name in _ARITHMETIC or name == "arange")


def _depends(
    node: Node, attrs: Attrs, types: Mapping[Value, Type], changed: Value, axis: int
) -> bool:
    """Change one token after the other on an axis; return whether others change with it."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        value: _draw(types[value].concrete(_SIZES), types[value].dtype, generator)
        for value in node.inputs
        if value is not None
    }
    numbers = {**concretize(attrs, _SIZES), "target": node.op}
    op = get_op(node.op)

    def run(values: Mapping[Value, Tensor]) -> tuple[Tensor, ...]:
        return op.reference([None if v is None else values[v] for v in node.inputs], numbers)

    before = run(tensors)
    for token in range(tensors[changed].shape[axis]):
        other = tensors[changed].clone()
        part = other.select(axis, token)
        part.copy_(~part if part.dtype == torch.bool else 1 - part)
        after = run({**tensors, changed: other})
        for value, old, new in zip(node.outputs, before, after, strict=True):
            apart = ~torch.isclose(old, new, rtol=0, atol=0, equal_nan=True)
            if bool(apart.any()) and not _only(apart, types[value], token):
                return True
    return False


def _draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw numbers; whole ones are places on any axis of two entries or more."""
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _only(apart: Tensor, kind: Type, token: int) -> bool:
    """True where on some axis of tokens nothing but this token changed."""
    for axis, size in enumerate(kind.shape):
        if _is_tokens(size):
            others = [a for a in range(apart.dim()) if a != axis]
            rows = apart.any(others) if others else apart
            if rows.nonzero().flatten().tolist() == [token]:
                return True
        elif isinstance(size, sympy.Expr) and S in size.free_symbols:
            return True
    return False
