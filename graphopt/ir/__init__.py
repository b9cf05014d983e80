"""The intermediate representation: programs, functions, ops, weights, printer and verifier."""

from graphopt.ir.graph import (
    Cache,
    Call,
    Function,
    In,
    KVState,
    Node,
    Param,
    Program,
    Value,
    resolve_attrs,
    unique_name,
)
from graphopt.ir.types import DTYPE_NAMES, DTYPES, SYMBOLS, B, Dim, P, S, T, Type
from graphopt.ir.weights import Array, Missing, Producer, Rows, Transposed, Weight, WeightStore

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "SYMBOLS",
    "Array",
    "B",
    "Cache",
    "Call",
    "Dim",
    "Function",
    "In",
    "KVState",
    "Missing",
    "Node",
    "P",
    "Param",
    "Producer",
    "Program",
    "Rows",
    "S",
    "T",
    "Transposed",
    "Type",
    "Value",
    "Weight",
    "WeightStore",
    "resolve_attrs",
    "unique_name",
]
