"""ATen arithmetic, comparisons, reductions and products that capture did not raise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch

from graphopt.ir.graph import Node, Value
from graphopt.lowering.onnx.builder import ONNX_DTYPES
from graphopt.lowering.onnx.ops.registry import Lowering, translation

# Operands ---------------------------------------------------------------------------------------


def dtype_of(lower: Lowering, node: Node, index: int = 0) -> torch.dtype:
    return lower.types[node.outputs[index]].dtype


def operand(lower: Lowering, item: Any, dtype: torch.dtype) -> ir.Value:
    """Return a tensor, a number or a size as a tensor of the dtype."""
    if isinstance(item, Value):
        value = lower.whole(item)
        return cast(lower, value, lower.types[item].dtype, dtype)
    if isinstance(item, sympy.Expr) and not item.is_number:
        return cast(lower, lower.builder.scalar(item), torch.int64, dtype)
    return lower.builder.number(_plain(item, dtype), dtype)


def _plain(item: Any, dtype: torch.dtype) -> Any:
    number = float(item) if isinstance(item, sympy.Expr) else item
    if dtype == torch.float32 and isinstance(number, float) and math.isfinite(number):
        limit = float(np.finfo(np.float32).max)
        return min(max(number, -limit), limit)
    return number


def cast(lower: Lowering, value: ir.Value, have: torch.dtype, want: torch.dtype) -> ir.Value:
    """Convert between element types; the same type costs nothing."""
    if have == want:
        return value
    return lower.builder.op("Cast", value, to=ONNX_DTYPES[want])


def _common(lower: Lowering, items: list[Any]) -> torch.dtype:
    """Return the dtype torch computes in: tensors decide, a float lifts integers."""
    dtype: torch.dtype | None = None
    for item in items:
        if isinstance(item, Value):
            own = lower.types[item].dtype
            dtype = own if dtype is None else torch.promote_types(dtype, own)
    if dtype is None:
        return torch.float32
    has_float = any(isinstance(item, float) for item in items)
    if has_float and not dtype.is_floating_point:
        return torch.float32
    return torch.int64 if dtype == torch.bool and not has_float and len(items) > 1 and not all(
        isinstance(item, Value) for item in items
    ) else dtype  # fmt: skip


# Arithmetic -------------------------------------------------------------------------------------


_LOGICAL = {"Add": "Or", "Max": "Or", "Mul": "And", "Min": "And"}
"""What arithmetic on truth values is, of which ONNX has none."""


def _binary(names: tuple[str, ...], op_type: str) -> None:
    @translation(*names)
    def form(lower: Lowering, node: Node) -> ir.Value:
        a, b = lower.aten_arg(node, 0), lower.aten_arg(node, 1, "other")
        dtype = dtype_of(lower, node)
        left, right = operand(lower, a, dtype), operand(lower, b, dtype)
        if dtype == torch.bool:
            return lower.builder.op(_LOGICAL[op_type], left, right)
        return lower.builder.op(op_type, left, _times_alpha(lower, node, right, dtype))


def _times_alpha(lower: Lowering, node: Node, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    alpha = lower.aten_arg(node, 2, "alpha", 1)
    return x if alpha == 1 else lower.builder.op("Mul", x, operand(lower, alpha, dtype))


for _names, _op_type in (
    (("aten.add",), "Add"),
    (("aten.sub",), "Sub"),
    (("aten.mul",), "Mul"),
    (("aten.maximum", "aten.max.other"), "Max"),
    (("aten.minimum", "aten.min.other"), "Min"),
    (("aten.pow",), "Pow"),
):
    _binary(_names, _op_type)


@translation("aten.div", "aten.true_divide")
def div(lower: Lowering, node: Node) -> ir.Value:
    dtype = dtype_of(lower, node)
    mode = lower.aten_arg(node, 2, "rounding_mode")
    a, b = (operand(lower, lower.aten_arg(node, i), dtype) for i in (0, 1))
    if mode == "floor":
        return _floor_divide(lower, a, b, dtype)
    result = lower.builder.op("Div", a, b)
    if mode == "trunc" and dtype.is_floating_point:
        floor, ceil = lower.builder.op("Floor", result), lower.builder.op("Ceil", result)
        negative = lower.builder.op("Less", result, lower.builder.number(0.0, dtype))
        return lower.builder.op("Where", negative, ceil, floor)
    return result


def _rest(lower: Lowering, a: ir.Value, b: ir.Value, dtype: torch.dtype) -> ir.Value:
    """The remainder with the sign of the divisor."""
    builder = lower.builder
    if not dtype.is_floating_point:
        return builder.op("Mod", a, b)
    # a - floor(a / b) b would carry the rounding of a / b.
    rest = builder.op("Mod", a, b, fmod=1)
    zero = builder.number(0.0, dtype)
    other_sign = builder.op("Less", builder.op("Mul", rest, builder.op("Sign", b)), zero)
    return builder.op("Where", other_sign, builder.op("Add", rest, b), rest)


def _floor_divide(lower: Lowering, a: ir.Value, b: ir.Value, dtype: torch.dtype) -> ir.Value:
    """ONNX divides integers towards zero, torch towards minus infinity."""
    builder = lower.builder
    result = builder.op("Div", builder.op("Sub", a, _rest(lower, a, b, dtype)), b)
    return builder.op("Round", result) if dtype.is_floating_point else result


@translation("aten.floor_divide")
def floor_divide(lower: Lowering, node: Node) -> ir.Value:
    dtype = dtype_of(lower, node)
    a, b = (operand(lower, lower.aten_arg(node, i), dtype) for i in (0, 1))
    return _floor_divide(lower, a, b, dtype)


@translation("aten.remainder")
def remainder(lower: Lowering, node: Node) -> ir.Value:
    dtype = dtype_of(lower, node)
    a, b = (operand(lower, lower.aten_arg(node, i), dtype) for i in (0, 1))
    return _rest(lower, a, b, dtype)


@translation("aten.fmod")
def fmod(lower: Lowering, node: Node) -> ir.Value:
    """The remainder with the sign of the dividend."""
    dtype = dtype_of(lower, node)
    a, b = (operand(lower, lower.aten_arg(node, i), dtype) for i in (0, 1))
    return lower.builder.op("Mod", a, b, fmod=1)


@translation("aten.rsub")
def rsub(lower: Lowering, node: Node) -> ir.Value:
    dtype = dtype_of(lower, node)
    a, b = (operand(lower, lower.aten_arg(node, i), dtype) for i in (0, 1))
    return lower.builder.op("Sub", b, _times_alpha(lower, node, a, dtype))


# Comparisons and logic --------------------------------------------------------------------------


def _comparison(name: str, op_type: str, negate: bool = False) -> None:
    @translation(name)
    def form(lower: Lowering, node: Node) -> ir.Value:
        items = [lower.aten_arg(node, 0), lower.aten_arg(node, 1)]
        dtype = _common(lower, items)
        if dtype == torch.bool and op_type != "Equal":
            dtype = torch.int32  # truth values have no order in ONNX
        a, b = (operand(lower, item, dtype) for item in items)
        result = lower.builder.op(op_type, a, b)
        return lower.builder.op("Not", result) if negate else result


for _name, _op_type, _negate in (
    ("aten.eq", "Equal", False),
    ("aten.ne", "Equal", True),
    ("aten.lt", "Less", False),
    ("aten.le", "LessOrEqual", False),
    ("aten.gt", "Greater", False),
    ("aten.ge", "GreaterOrEqual", False),
):
    _comparison(_name, _op_type, _negate)


def _logic(names: tuple[str, ...], op_type: str) -> None:
    """The operator on truth values, and, unless it is logical by name, on the bits of integers."""

    @translation(*names)
    def form(lower: Lowering, node: Node) -> ir.Value:
        dtype = dtype_of(lower, node)
        a, b = (operand(lower, lower.aten_arg(node, i), dtype) for i in (0, 1))
        return lower.builder.op(op_type if dtype == torch.bool else f"Bitwise{op_type}", a, b)


for _word, _op_type in (("and", "And"), ("or", "Or"), ("xor", "Xor")):
    _logic((f"aten.__{_word}__", f"aten.bitwise_{_word}", f"aten.logical_{_word}"), _op_type)


@translation("aten.logical_not", "aten.bitwise_not")
def logical_not(lower: Lowering, node: Node) -> ir.Value:
    dtype = dtype_of(lower, node)
    x = operand(lower, lower.aten_arg(node, 0), dtype)
    return lower.builder.op("Not" if dtype == torch.bool else "BitwiseNot", x)


@translation("aten.where")
def where(lower: Lowering, node: Node) -> ir.Value:
    dtype = dtype_of(lower, node)
    condition = operand(lower, lower.aten_arg(node, 0), torch.bool)
    a, b = (operand(lower, lower.aten_arg(node, i), dtype) for i in (1, 2))
    return lower.builder.op("Where", condition, a, b)


@translation("aten.masked_fill")
def masked_fill(lower: Lowering, node: Node) -> ir.Value:
    dtype = dtype_of(lower, node)
    x = operand(lower, lower.aten_arg(node, 0), dtype)
    mask = operand(lower, lower.aten_arg(node, 1), torch.bool)
    fill = operand(lower, lower.aten_arg(node, 2), dtype)
    return lower.builder.op("Where", mask, fill, x)


# Reductions -------------------------------------------------------------------------------------


def _axes(lower: Lowering, item: Any) -> ir.Value | None:
    if item is None:
        return None
    dims = [item] if isinstance(item, int) else list(item)
    return lower.builder.constant(dims) if dims else None


def _reduction(names: tuple[str, ...], op_type: str) -> None:
    @translation(*names)
    def form(lower: Lowering, node: Node) -> ir.Value:
        dtype = dtype_of(lower, node)
        x = operand(lower, lower.aten_arg(node, 0), dtype)
        axes = _axes(lower, lower.aten_arg(node, 1, "dim"))
        keep = int(bool(lower.aten_arg(node, 2, "keepdim", False)))
        return lower.builder.op(op_type, x, axes, keepdims=keep)


_reduction(("aten.mean",), "ReduceMean")
_reduction(("aten.sum",), "ReduceSum")
_reduction(("aten.amax", "aten.max.default"), "ReduceMax")
_reduction(("aten.amin", "aten.min.default"), "ReduceMin")
_reduction(("aten.prod",), "ReduceProd")
_reduction(("aten.logsumexp",), "ReduceLogSumExp")


@translation("aten.any", "aten.all")
def any_or_all(lower: Lowering, node: Node) -> ir.Value:
    truth = operand(lower, lower.aten_arg(node, 0), torch.bool)
    x = cast(lower, truth, torch.bool, torch.int64)
    axes = _axes(lower, lower.aten_arg(node, 1, "dim"))
    keep = int(bool(lower.aten_arg(node, 2, "keepdim", False)))
    kind = "ReduceMax" if ".any." in node.op else "ReduceMin"
    total = lower.builder.op(kind, x, axes, keepdims=keep)
    return lower.builder.op("Cast", total, to=ir.DataType.BOOL)


@translation("aten.var.dim", "aten.var.correction", "aten.std.dim", "aten.std.correction")
def variance(lower: Lowering, node: Node) -> ir.Value:
    source = lower.aten_arg(node, 0)
    builder, x, shape = lower.builder, lower.whole(source), lower.types[source].shape
    dims = lower.aten_arg(node, 1, "dim")
    dims = list(range(len(shape))) if not dims else [dims] if isinstance(dims, int) else dims
    correction = lower.aten_arg(node, 2, "correction", None) if ".correction" in node.op else int(
        lower.aten_arg(node, 2, "unbiased", True)
    )  # fmt: skip
    keep = int(bool(lower.aten_arg(node, 3, "keepdim", False)))
    axes = builder.constant(list(dims))
    apart = builder.op("Sub", x, builder.op("ReduceMean", x, axes, keepdims=1))
    total = builder.op("ReduceSumSquare", apart, axes, keepdims=keep)
    count = sympy.Integer(1)
    for axis in dims:
        count *= shape[axis]
    freedom = count - (1 if correction is None else correction)
    found = builder.op("Div", total, operand(lower, freedom, torch.float32))
    return builder.op("Sqrt", found) if ".std." in node.op else found


@translation("aten.max.dim", "aten.min.dim")
def extreme(lower: Lowering, node: Node) -> list[ir.Value]:
    x, axis = lower.whole(node.inputs[0]), lower.aten_arg(node, 1, "dim")
    keep = int(bool(lower.aten_arg(node, 2, "keepdim", False)))
    kind = "Max" if ".max." in node.op else "Min"
    axes = lower.builder.constant([axis])
    return [
        lower.builder.op(f"Reduce{kind}", x, axes, keepdims=keep),
        lower.builder.op(f"Arg{kind}", x, axis=axis, keepdims=keep),
    ]


@translation("aten.argmax", "aten.argmin")
def argmax(lower: Lowering, node: Node) -> ir.Value:
    kind = "ArgMax" if ".argmax" in node.op else "ArgMin"
    keep = bool(lower.aten_arg(node, 2, "keepdim", False))
    x, axis = lower.whole(node.inputs[0]), lower.aten_arg(node, 1, "dim")
    if axis is None:
        if keep:
            raise ValueError("the place in the whole tensor with its axes kept has no ONNX form")
        flat = lower.builder.op("Reshape", x, lower.builder.constant([-1]))
        return lower.builder.op(kind, flat, axis=0, keepdims=0)
    return lower.builder.op(kind, x, axis=axis, keepdims=int(keep))


@translation("aten.cumsum")
def cumsum(lower: Lowering, node: Node) -> ir.Value:
    x = operand(lower, lower.aten_arg(node, 0), dtype_of(lower, node))
    return lower.builder.op("CumSum", x, lower.builder.constant(lower.aten_arg(node, 1)))


@translation("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax")
def softmax(lower: Lowering, node: Node) -> ir.Value:
    x = operand(lower, lower.aten_arg(node, 0), dtype_of(lower, node))
    op_type = "LogSoftmax" if "log" in node.op else "Softmax"
    return lower.builder.op(op_type, x, axis=lower.aten_arg(node, 1))


@translation("aten.linalg_vector_norm", "aten.norm")
def vector_norm(lower: Lowering, node: Node) -> ir.Value:
    order = lower.aten_arg(node, 1, "ord", 2)
    if order not in (1, 2):
        raise ValueError(f"a norm of order {order} has no ONNX form")
    axes = _axes(lower, lower.aten_arg(node, 2, "dim"))
    keep = int(bool(lower.aten_arg(node, 3, "keepdim", False)))
    x = lower.whole(node.inputs[0])
    return lower.builder.op(f"ReduceL{int(order)}", x, axes, keepdims=keep)


# Products ---------------------------------------------------------------------------------------


@translation("aten.matmul", "aten.bmm", "aten.mm", "aten.mv", "aten.dot")
def matmul(lower: Lowering, node: Node) -> ir.Value:
    a, b = (lower.whole(lower.aten_arg(node, i)) for i in (0, 1))
    return lower.builder.op("MatMul", a, b)


@translation("aten.baddbmm", "aten.addmm")
def addmm(lower: Lowering, node: Node) -> ir.Value:
    builder = lower.builder
    c, a, b = (lower.whole(lower.aten_arg(node, i)) for i in (0, 1, 2))
    beta, alpha = lower.aten_arg(node, 3, "beta", 1), lower.aten_arg(node, 4, "alpha", 1)
    product = builder.op("MatMul", a, b)
    if alpha != 1:
        product = builder.op("Mul", product, builder.number(float(alpha)))
    if beta == 0:
        return product
    if beta != 1:
        c = builder.op("Mul", c, builder.number(float(beta)))
    return builder.op("Add", product, c)


@translation("aten.addcmul", "aten.addcdiv")
def addcmul(lower: Lowering, node: Node) -> ir.Value:
    builder, dtype = lower.builder, dtype_of(lower, node)
    x, a, b = (operand(lower, lower.aten_arg(node, i), dtype) for i in (0, 1, 2))
    term = builder.op("Mul" if ".addcmul" in node.op else "Div", a, b)
    value = lower.aten_arg(node, 3, "value", 1)
    if value != 1:
        term = builder.op("Mul", term, operand(lower, value, dtype))
    return builder.op("Add", x, term)


@translation("aten.lerp")
def lerp(lower: Lowering, node: Node) -> ir.Value:
    builder, dtype = lower.builder, dtype_of(lower, node)
    a, b, share = (operand(lower, lower.aten_arg(node, i), dtype) for i in (0, 1, 2))
    return builder.op("Add", a, builder.op("Mul", share, builder.op("Sub", b, a)))


@translation("aten.outer")
def outer(lower: Lowering, node: Node) -> ir.Value:
    dtype = dtype_of(lower, node)
    a, b = (operand(lower, lower.aten_arg(node, i), dtype) for i in (0, 1))
    return lower.builder.op("Mul", lower.builder.op("Unsqueeze", a, lower.builder.constant([1])), b)


@translation("aten.einsum")
def einsum(lower: Lowering, node: Node) -> ir.Value:
    operands = [lower.whole(value) for value in node.inputs]
    leaves = node.attrs["args"][1]
    ordered = [operands[leaf.index] for leaf in leaves]
    return lower.builder.op("Einsum", *ordered, equation=lower.aten_arg(node, 0).replace(" ", ""))


@translation("aten.linear")
def linear(lower: Lowering, node: Node) -> ir.Value:
    x, weight = lower.whole(lower.aten_arg(node, 0)), lower.whole(lower.aten_arg(node, 1))
    bias = lower.aten_arg(node, 2, "bias")
    y = lower.builder.op("MatMul", x, lower.builder.op("Transpose", weight, perm=[1, 0]))
    return y if bias is None else lower.builder.op("Add", y, lower.whole(bias))


@translation("aten.layer_norm", "aten.rms_norm")
def norm(lower: Lowering, node: Node) -> ir.Value:
    shape, weight = lower.aten_arg(node, 1), lower.aten_arg(node, 2, "weight")
    is_layer = ".layer_norm" in node.op
    bias = lower.aten_arg(node, 3, "bias") if is_layer else None
    eps = lower.aten_arg(node, 4 if is_layer else 3, "eps") or (
        1e-5 if is_layer else torch.finfo(torch.float32).eps
    )
    gain = (
        lower.builder.constant(np.ones([int(size) for size in shape]), np.float32)
        if weight is None
        else lower.whole(weight)
    )
    op_type = "LayerNormalization" if is_layer else "RMSNormalization"
    return lower.builder.op(
        op_type, lower.whole(node.inputs[0]), gain, None if bias is None else lower.whole(bias),
        axis=-len(shape), epsilon=eps,
    )  # fmt: skip
