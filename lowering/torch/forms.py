"""What an op is in `model.py`: a call of a function, or an expression of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from graphopt.ir.graph import Node
from graphopt.ir.ops import get_op
from graphopt.lowering.torch.packed import rows_text
from graphopt.lowering.torch.text import HELPERS, quoted

if TYPE_CHECKING:
    from graphopt.lowering.torch.body import BodyPrinter

TorchForm: TypeAlias = "Callable[[BodyPrinter, Node], str]"
"""Returns the expression of a node."""

_CALLEES: dict[str, str] = {}
_FORMS: dict[str, TorchForm] = {}


def torch_callee(op: str, callee: str) -> None:
    """Make a call of `callee` the form of an op: operands by place, attributes by name.

    Args:
        callee: Such as `F.silu`; a name without a dot is a function of `graphopt.ir.functional`,
            which is copied into the model.

    Raises:
        ValueError: The op has a form already.
    """
    _refuse_second(op)
    _CALLEES[op] = callee


def torch_form(op: str) -> Callable[[TorchForm], TorchForm]:
    """Function decorator: make an expression of its own the form of an op.

    Raises:
        ValueError: The op has a form already.
    """
    _refuse_second(op)

    def add(form: TorchForm) -> TorchForm:
        _FORMS[op] = form
        return form

    return add


def _refuse_second(op: str) -> None:
    if op in _CALLEES or op in _FORMS:
        raise ValueError(f"{op!r} has a form in torch already")


def callee_of(op: str) -> str | None:
    """Return what is called for an op; None where it has a form of its own, or none."""
    return _CALLEES.get(op)


def form_of(op: str) -> TorchForm | None:
    """Return the form of an op; None where it is a call, or has none."""
    return _FORMS.get(op)


for _op, _callee in {
    "abs": "torch.abs",
    "gelu": "F.gelu",
    "relu": "F.relu",
    "sigmoid": "torch.sigmoid",
    "silu": "F.silu",
    "tanh": "torch.tanh",
}.items():
    torch_callee(_op, _callee)

# Functions of graphopt.ir.functional that are called as their ops are.
for _op in (
    "add_rms_norm", "axial_rope_table", "by_length", "gelu_tanh", "kronecker", "layer_norm",
    "linear", "mean_square", "merge_heads", "ntk_frequencies", "picture_mask",
    "quantise_dequantise", "quick_gelu", "relu2", "rms_norm", "rms_norm_by", "rope", "rope_pair",
    "rope_table", "softcap", "split_heads", "top_k_gating", "transformed", "transpose_heads",
):  # fmt: skip
    torch_callee(_op, _op)


@torch_form("add")
def _add(printer: BodyPrinter, node: Node) -> str:
    return printer.infix(node, "+", node.inputs[0], node.inputs[1])


@torch_form("mul")
def _mul(printer: BodyPrinter, node: Node) -> str:
    return printer.infix(node, "*", node.inputs[0], node.inputs[1])


@torch_form("attention")
def _attention(printer: BodyPrinter, node: Node) -> str:
    return printer.attention(node)


@torch_form("policy_attention")
def _policy_attention(printer: BodyPrinter, node: Node) -> str:
    return printer.policy_attention(node)


@torch_form("fused_linear")
def _fused_linear(printer: BodyPrinter, node: Node) -> str:
    return printer.fused_linear(node)


@torch_form("integer_linear")
@torch_form("norm_packed_linear")
@torch_form("packed_linear")
@torch_form("transformed_packed_linear")
def _linear_of_codes(printer: BodyPrinter, node: Node) -> str:
    return printer.packed_linear(node)


@torch_form("no_addend")
def _no_addend(printer: BodyPrinter, node: Node) -> str:
    return "None"


@torch_form("act_mul")
def _act_mul(printer: BodyPrinter, node: Node) -> str:
    gate, up = (printer.name(value) for value in node.inputs if value is not None)
    return printer.helper("act_mul", f"{gate}, {up}, {quoted(node.attrs['act'])}")


@torch_form("embedding")
def _embedding(printer: BodyPrinter, node: Node) -> str:
    ids, weight = node.inputs
    assert ids is not None and weight is not None
    rows = printer.name(ids)
    offset = node.attrs.get("offset", 0)
    if offset != 0:
        rows += f" + {printer.literal(offset, node)}"
    if weight in printer.quantised:
        return rows_text(printer.name(weight), rows)
    return f"F.embedding({rows}, {printer.name(weight)})"


@torch_form("experts")
def _experts(printer: BodyPrinter, node: Node) -> str:
    act = _CALLEES[node.attrs["act"]]
    if act in HELPERS:
        printer.helpers.add(act)
    arguments = [*printer.operands(node, node.inputs), f"act={act}"]
    return printer.helper("experts", ", ".join(arguments))


def _named(printer: BodyPrinter, node: Node, given: int, *options: str) -> str:
    """Return a call whose operands behind the first `given` ones are given by name."""
    names = [name.rstrip("?") for name in get_op(node.op).operands]
    texts = [
        printer.name(value) if place < given else f"{name}={printer.name(value)}"
        for place, (name, value) in enumerate(zip(names, node.inputs, strict=False))
        if value is not None
    ]
    return printer.helper(node.op, ", ".join([*texts, *options]))


@torch_form("moe")
def _moe(printer: BodyPrinter, node: Node) -> str:
    options = f"act={quoted(node.attrs['act'])}", f"active={node.attrs['active']}"
    return _named(printer, node, 4, *options)


@torch_form("route")
def _route(printer: BodyPrinter, node: Node) -> str:
    return _named(printer, node, 2, *printer.options_of(node))


@torch_form("scale")
def _scale(printer: BodyPrinter, node: Node) -> str:
    factor = printer.literal(node.attrs["factor"], node)
    return printer.infix(node, "*", node.inputs[0], factor)
