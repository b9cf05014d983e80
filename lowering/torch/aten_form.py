"""What a node of an ATen operator is in `model.py`: a call of `aten`, or of a function."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from graphopt.ir.graph import Node
from graphopt.ir.ops.aten import needs_one_dtype, resolve_target

if TYPE_CHECKING:
    from graphopt.lowering.torch.body import BodyPrinter

# Products whose second operand has the weights' dtype, and one that is not of torch's own.
_ATEN_CALLEES = {
    "aten.bmm.default": "matmul",
    "aten.matmul.default": "matmul",
    "aten.mm.default": "matmul",
    "transformers.grouped_mm_fallback.default": "grouped_matmul",
}


def aten_form(printer: BodyPrinter, node: Node) -> str:
    """Return the call of an ATen operator, or of the function that stands for it.

    Raises:
        ValueError: PyTorch itself has no such operator, or an argument has no form.
    """
    args = [printer.literal(arg, node) for arg in node.attrs["args"]]
    for key, value in node.attrs.get("kwargs", {}).items():
        if key != "pin_memory" or value:
            args.append(printer.keyword(key, value, node))
    if node.op in _ATEN_CALLEES:
        return printer.helper(_ATEN_CALLEES[node.op], ", ".join(args))
    target = _torch_operator(node.op)
    if needs_one_dtype(node.op, node.attrs):
        text = printer.helper("narrowed", ", ".join([node.op, *args]))
    else:
        text = f"{node.op}({', '.join(args)})"
    returns = target._schema.returns
    if len(returns) == 1 and isinstance(returns[0].type, torch.TensorType):
        return text
    # A list or tuple: one name takes its first part, fewer names than parts the first ones.
    if len(node.outputs) == 1:
        return f"{text}[0]"
    return text if len(returns) in (1, len(node.outputs)) else f"{text}[:{len(node.outputs)}]"


def _torch_operator(name: str) -> torch._ops.OpOverload:
    """Return an operator that PyTorch itself has.

    Raises:
        ValueError: It is of another library, or there is none of that name.
    """
    if not re.fullmatch(r"aten(\.\w+){2}", name, flags=re.ASCII):
        raise ValueError("PyTorch itself has no such operator")
    try:
        target = resolve_target(name)
    except KeyError:
        target = None
    if not isinstance(target, torch._ops.OpOverload):
        raise ValueError("PyTorch has no such operator")
    return target
