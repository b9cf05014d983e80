"""When two programs are the same but for what no text and no result depends on."""

from __future__ import annotations

from typing import Any

from graphopt.ir.graph import In, Program
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.aten import map_leaves
from graphopt.ir.serialize import program_to_json


def plain(program: Program) -> dict[str, Any]:
    """Return a program as data in which values are numbered, and defaults are left out.

    The names of values that are written where they are read are in no text; an attribute at its
    default is there or not, as an operand that is absent at the end.
    """
    program = program.copy()
    for function in program.functions.values():
        for node in function.nodes:
            while node.inputs and node.inputs[-1] is None:
                node.inputs.pop()
            if is_aten(node.op):
                _number_arguments(node)
            else:
                defaults = get_op(node.op).defaults
                node.attrs = {
                    key: value
                    for key, value in node.attrs.items()
                    if key not in defaults or defaults[key] != value
                }
        used = [value for node in function.nodes for value in node.inputs if value is not None]
        slots = {value: slot for slot, value in function.weights.items()}
        order = [slots[v] for v in dict.fromkeys([*used, *function.results]) if v in slots]
        order += sorted(set(function.weights) - set(order))
        function.weights = {slot: function.weights[slot] for slot in order}
        for number, value in enumerate(list(function.values())):
            value.name = f"v{number}"
    data = program_to_json(program)
    data["functions"] = sorted(data["functions"], key=lambda function: function["name"])
    return data


def _number_arguments(node: Any) -> None:
    """Put operands in the order in which arguments name them."""
    inputs: list[Any] = []

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, In):
            return leaf
        value = node.inputs[leaf.index]
        if value is None:
            return None
        if value not in inputs:
            inputs.append(value)
        return In(inputs.index(value))

    node.attrs["args"] = map_leaves(node.attrs["args"], change)
    node.attrs["kwargs"] = map_leaves(node.attrs.get("kwargs", {}), change)
    node.inputs = inputs
