"""Attributes of nodes and calls as JSON: numbers, dtypes, sizes, types and policies."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch

from graphopt.errors import SourceError, UsageError
from graphopt.ir.algebra import parse_size
from graphopt.ir.graph import In, Param
from graphopt.ir.kv_policies import KVPolicy, policy_from_dict, policy_to_dict
from graphopt.ir.types import DTYPE_NAMES, DTYPES, Type
from graphopt.support.plain import shown

AGAIN = "Compile the model again."
"""What to do about a saved program that cannot be read."""

_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

# By their names, so that no name leads to anything else of torch's.
_CONSTANTS = {
    str(item).removeprefix("torch."): item
    for item in (*vars(torch).values(), torch.strided)
    if isinstance(item, torch.dtype | torch.memory_format) or item is torch.strided
}


def malformed(what: str) -> SourceError:
    """Return the error of a saved program that says what none of its format says."""
    return SourceError(f"program.json is malformed: {what}.", AGAIN)


def pack_attribute(value: Any) -> Any:
    """Return an attribute as JSON; what JSON lacks becomes a one-key object.

    Raises:
        TypeError: It is of a kind that no op has.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else {"float": str(value)}
    if isinstance(value, Param):
        return {"param": value.name}
    if isinstance(value, In):
        return {"in": value.index}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "any"}
    if isinstance(value, torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, sympy.Expr):
        return {"expr": str(value)}
    if isinstance(value, Type):
        return {"type": [[pack_attribute(size) for size in value.shape], DTYPE_NAMES[value.dtype]]}
    if isinstance(value, KVPolicy):
        return {"policy": policy_to_dict(value)}
    if isinstance(value, tuple):
        return {"tuple": [pack_attribute(item) for item in value]}
    if isinstance(value, list):
        return [pack_attribute(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: pack_attribute(item) for key, item in value.items()}}
    raise TypeError(f"an attribute of type {type(value).__name__} cannot be saved")


def unpack_attribute(value: Any) -> Any:
    """Return an attribute.

    Raises:
        SourceError: It is of no kind that `pack_attribute` makes.
    """
    if isinstance(value, list):
        return [unpack_attribute(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"float": str(name)} if name in _FLOATS:
            return _FLOATS[name]
        case {"param": str(name)}:
            return Param(name)
        case {"in": int(index)} if not isinstance(index, bool) and index >= 0:
            return In(index)
        case {"dtype": str(name)} | {"torch": str(name)} if name in _CONSTANTS:
            return _CONSTANTS[name]
        case {"device": str()}:
            return torch.device("cpu")
        case {"expr": content}:
            return _parse_expr(content)
        case {"type": [list(shape), str(name)]} if name in DTYPES:
            return _unpack_type(shape, DTYPES[name])
        case {"policy": dict(fields)}:
            return unpack_policy(fields, "an attribute")
        case {"tuple": list(items)}:
            return tuple(unpack_attribute(item) for item in items)
        case {"dict": dict(items)}:
            return {key: unpack_attribute(item) for key, item in items.items()}
    raise malformed(f"the attribute {shown(value)} means nothing")


def _unpack_type(shape: list[Any], dtype: torch.dtype) -> Type:
    sizes = tuple(unpack_attribute(size) for size in shape)
    for size in sizes:
        plain = type(size) is int and 0 <= size <= 2**48
        if len(sizes) > 16 or not (plain or isinstance(size, sympy.Expr)):
            raise malformed(f"{shown(shape)} is no shape")
    return Type(sizes, dtype)


def _parse_expr(text: object) -> Any:
    try:
        return parse_size(text)
    except ValueError as error:
        raise SourceError(
            f"program.json holds a size that is not algebra: {shown(text)}.", AGAIN
        ) from error


def unpack_policy(fields: dict[str, Any], where: str) -> KVPolicy:
    """Return the policy of a KV cache.

    Args:
        where: What has it, for messages.

    Raises:
        SourceError: There is no such policy.
    """
    try:
        return policy_from_dict(fields)
    except UsageError as error:
        raise malformed(f"{where}: {error.message.rstrip('.')}") from error
