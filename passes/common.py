"""What several passes ask of a program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

from graphopt.ir.ops.aten import map_leaves


def mentions_sizes(attrs: Mapping[str, Any]) -> bool:
    """True where an attribute depends on B, S or P."""
    found = False

    def look(leaf: Any) -> Any:
        nonlocal found
        found = found or (isinstance(leaf, sympy.Expr) and bool(leaf.free_symbols))
        return leaf

    for key, value in attrs.items():
        if key != "types":
            map_leaves(value, look)
    return found
