"""The ATen op: what capture could not raise, kept as it was exported, still runnable."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from graphopt.ir.graph import In
from graphopt.ir.ops.base import Attrs, Op, Tensors, Types, register
from graphopt.ir.types import Type, evaluate


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return `value` with `change` applied to every leaf of nested lists, tuples and dicts."""
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_leaves(item, change) for key, item in value.items()}
    return change(value)


_REGISTERED_BY = {"transformers": "transformers.integrations.moe"}
"""Namespace -> the module that registers its operators, which a saved program needs first."""


def resolve_target(name: str) -> Callable[..., Any]:
    """Return the torch operator called `namespace.name.overload`.

    Raises:
        KeyError: There is no such operator, or it reads files, which no model needs.
    """
    try:
        namespace, op, overload = name.split(".")
        if namespace in _REGISTERED_BY:
            importlib.import_module(_REGISTERED_BY[namespace])
        if op == "from_file":
            raise AttributeError(name)
        return getattr(getattr(getattr(torch.ops, namespace), op), overload)
    except (AttributeError, ImportError, ValueError) as error:
        raise KeyError(f"no torch operator {name!r}") from error


def concretize(attrs: Mapping[str, Any], sizes: Mapping[sympy.Symbol, int]) -> dict[str, Any]:
    """Return the attributes with symbolic sizes replaced by numbers."""

    def change(leaf: Any) -> Any:
        return evaluate(leaf, sizes) if isinstance(leaf, sympy.Expr) else leaf

    return {key: map_leaves(value, change) for key, value in attrs.items() if key != "types"}


@register
class Aten(Op):
    """Any torch operator.

    Attributes: `args` and `kwargs` as exported, with `In(i)` for operand i and sympy
    expressions for sizes; `types`, the output types as exported.
    """

    name = "aten"
    operands = ()

    def infer(self, types: Types, attrs: Attrs) -> list[Type]:
        return list(attrs["types"])

    def reference(self, tensors: Tensors, attrs: Attrs) -> tuple[Tensor, ...]:
        target = resolve_target(attrs["target"])
        anchor = next((t for t in tensors if t is not None), None)
        device = anchor.device if anchor is not None else torch.device("cpu")
        floats = [t.dtype for t in tensors if t is not None and t.is_floating_point()]
        # Exported graphs name fp32; under an fp64 reference they mean "the working precision".
        wide = torch.float64 if torch.float64 in floats else torch.float32

        def change(leaf: Any) -> Any:
            if isinstance(leaf, In):
                operand = tensors[leaf.index]
                if operand is not None and operand.dtype is torch.float32:
                    # Such as whole numbers that became fp32 and now meet an fp64 operand.
                    return operand.to(wide)
                return operand
            if isinstance(leaf, torch.device):
                return device
            if leaf is torch.float32:
                return wide
            return leaf

        result = target(
            *map_leaves(attrs["args"], change),
            **map_leaves(attrs.get("kwargs", {}), change),
        )
        return (result,) if isinstance(result, Tensor) else tuple(result)
