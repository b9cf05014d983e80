"""Symbolic sizes and tensor types.

`B` is the batch, `S` the number of query tokens in this step, `P` the number of tokens
already in the KV cache, and `T = P + S` the number of keys attention sees.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch

from graphopt.ir.encoding import Packed

B = sympy.Symbol("B", integer=True, positive=True)
S = sympy.Symbol("S", integer=True, positive=True)
P = sympy.Symbol("P", integer=True, nonnegative=True)
T = P + S

SYMBOLS: dict[str, sympy.Symbol] = {"B": B, "S": S, "P": P}

Dim: TypeAlias = int | sympy.Expr

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def dim(value: object) -> Dim:
    """Return `value` as an `int` where it is a plain number, else as a sympy expression."""
    if isinstance(value, int):
        return value
    expr = sympy.sympify(value)
    return int(expr) if expr.is_Integer else expr


def numel(shape: Iterable[Dim]) -> Dim:
    """Return the number of elements of `shape`."""
    total: Dim = 1
    for size in shape:
        total = total * size
    return dim(total)


def evaluate(value: Dim, sizes: Mapping[sympy.Symbol, int]) -> int:
    """Return `value` with the symbols replaced by `sizes`.

    Raises:
        ValueError: A symbol of `value` has no size, or the result is not whole.
    """
    return value if isinstance(value, int) else _evaluate(value, tuple(sizes.items()))


@functools.lru_cache(maxsize=2**14)  # the same few sizes are asked for at every node of a run
def _evaluate(value: sympy.Expr, sizes: tuple[tuple[sympy.Symbol, int], ...]) -> int:
    result = value.subs(sizes)
    if not result.is_Integer:
        raise ValueError(f"{value} is not a whole number for {dict(sizes)}")
    return int(result)


@dataclass(frozen=True, slots=True)
class Type:
    """Shape (ints or expressions in B, S, P), dtype and encoding of a tensor.

    What is packed has the shape and dtype of the value that its codes stand for.
    """

    shape: tuple[Dim, ...]
    dtype: torch.dtype
    encoding: Packed | None = None

    def __str__(self) -> str:
        sizes = ",".join(str(size).replace(" ", "") for size in self.shape)
        text = f"{DTYPE_NAMES.get(self.dtype, str(self.dtype))}[{sizes}]"
        return text if self.encoding is None else f"{text} {self.encoding}"

    def __repr__(self) -> str:
        return f"Type({self})"

    @property
    def numel(self) -> Dim:
        return numel(self.shape)

    @property
    def bytes(self) -> Dim:
        if self.encoding is None:
            return dim(numel(self.shape) * self.dtype.itemsize)
        stored = self.encoding.stored(self.concrete({}), self.dtype)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored.values())

    def concrete(self, sizes: Mapping[sympy.Symbol, int]) -> tuple[int, ...]:
        """Return the shape for the given B, S and P."""
        return tuple(evaluate(size, sizes) for size in self.shape)
