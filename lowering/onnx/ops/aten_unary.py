"""ATen functions of one variable: activations, exponentials, rounding and clamps."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch

from graphopt.ir.graph import Node
from graphopt.lowering.onnx.ops.aten import dtype_of, operand
from graphopt.lowering.onnx.ops.registry import Lowering, translation


def _unary(names: tuple[str, ...], op_type: str) -> None:
    @translation(*names)
    def form(lower: Lowering, node: Node) -> ir.Value:
        x = operand(lower, lower.aten_arg(node, 0), dtype_of(lower, node))
        return lower.builder.op(op_type, x)


for _names, _op_type in (
    (("aten.neg",), "Neg"),
    (("aten.abs",), "Abs"),
    (("aten.exp",), "Exp"),
    (("aten.log",), "Log"),
    (("aten.sqrt",), "Sqrt"),
    (("aten.reciprocal",), "Reciprocal"),
    (("aten.cos",), "Cos"),
    (("aten.sin",), "Sin"),
    (("aten.tanh",), "Tanh"),
    (("aten.sigmoid",), "Sigmoid"),
    (("aten.erf",), "Erf"),
    (("aten.tan",), "Tan"),
    (("aten.asin",), "Asin"),
    (("aten.acos",), "Acos"),
    (("aten.atan",), "Atan"),
    (("aten.sinh",), "Sinh"),
    (("aten.cosh",), "Cosh"),
    (("aten.asinh",), "Asinh"),
    (("aten.acosh",), "Acosh"),
    (("aten.atanh",), "Atanh"),
    (("aten.sign", "aten.sgn"), "Sign"),
):
    _unary(_names, _op_type)


@translation("aten.relu")
def relu(lower: Lowering, node: Node) -> ir.Value:
    dtype = dtype_of(lower, node)
    x = lower.whole(node.inputs[0])
    if dtype.is_floating_point:
        return lower.builder.op("Relu", x)
    return lower.builder.op("Max", x, lower.builder.number(0, dtype))


def _rounding(name: str, op_type: str) -> None:
    @translation(f"{name}.default")
    def form(lower: Lowering, node: Node) -> ir.Value:
        x = lower.whole(node.inputs[0])
        # Whole numbers are round already, and ONNX has no such op for them.
        is_float = dtype_of(lower, node).is_floating_point
        return lower.builder.op(op_type, x) if is_float else x


for _name, _op_type in (("floor", "Floor"), ("ceil", "Ceil"), ("round", "Round")):
    _rounding(f"aten.{_name}", _op_type)


@translation("aten.trunc")
def trunc(lower: Lowering, node: Node) -> ir.Value:
    """A cast to whole numbers would overflow where fp32 has no fractions any more."""
    builder, x = lower.builder, lower.whole(node.inputs[0])
    if not dtype_of(lower, node).is_floating_point:
        return x
    whole = builder.op("Floor", builder.op("Abs", x))
    return builder.op("Mul", whole, builder.op("Sign", x))


@translation("aten.square")
def square(lower: Lowering, node: Node) -> ir.Value:
    x = lower.whole(node.inputs[0])
    return lower.builder.op("Mul", x, x)


@translation("aten.rsqrt")
def rsqrt(lower: Lowering, node: Node) -> ir.Value:
    x = operand(lower, node.inputs[0], dtype_of(lower, node))
    root = lower.builder.op("Sqrt", x)
    return lower.builder.op("Reciprocal", root)


# Exponentials and logarithms --------------------------------------------------------------------


@translation("aten.log1p")
def log1p(lower: Lowering, node: Node) -> ir.Value:
    """log(1 + x) as log(y) x / (y - 1) with y = 1 + x, whose rounding cancels out."""
    builder = lower.builder
    x = operand(lower, lower.aten_arg(node, 0), dtype_of(lower, node))
    one = builder.number(1.0)
    y = builder.op("Add", x, one)
    change = builder.op("Sub", y, one)
    bent = builder.op("Mul", builder.op("Log", y), builder.op("Div", x, change))
    exact = builder.op("Equal", change, x)
    tiny = builder.op("Equal", change, builder.number(0.0))
    result = builder.op("Where", exact, builder.op("Log", y), bent)
    return builder.op("Where", tiny, x, result)


def _expm1(lower: Lowering, x: ir.Value) -> ir.Value:
    """exp(x) - 1 as 2 tanh(x/2) / (1 - tanh(x/2)), which does not cancel near zero."""
    builder = lower.builder
    half = builder.op("Tanh", builder.op("Mul", x, builder.number(0.5)))
    top = builder.op("Mul", half, builder.number(2.0))
    bent = builder.op("Div", top, builder.op("Sub", builder.number(1.0), half))
    plain = builder.op("Sub", builder.op("Exp", x), builder.number(1.0))
    small = builder.op("Less", builder.op("Abs", x), builder.number(1.0))
    return builder.op("Where", small, bent, plain)


@translation("aten.expm1")
def expm1(lower: Lowering, node: Node) -> ir.Value:
    return _expm1(lower, operand(lower, node.inputs[0], dtype_of(lower, node)))


@translation("aten.exp2")
def exp2(lower: Lowering, node: Node) -> ir.Value:
    x = operand(lower, node.inputs[0], dtype_of(lower, node))
    return lower.builder.op("Pow", lower.builder.number(2.0), x)


def _logarithm(name: str, base: float) -> None:
    @translation(name)
    def form(lower: Lowering, node: Node) -> ir.Value:
        x = operand(lower, node.inputs[0], dtype_of(lower, node))
        factor = lower.builder.number(1 / math.log(base))
        return lower.builder.op("Mul", lower.builder.op("Log", x), factor)


_logarithm("aten.log2", 2)
_logarithm("aten.log10", 10)


@translation("aten.erfc")
def erfc(lower: Lowering, node: Node) -> ir.Value:
    x = operand(lower, node.inputs[0], dtype_of(lower, node))
    return lower.builder.op("Sub", lower.builder.number(1.0), lower.builder.op("Erf", x))


# Activations ------------------------------------------------------------------------------------


@translation("aten.softplus")
def softplus(lower: Lowering, node: Node) -> ir.Value:
    builder, x = lower.builder, lower.whole(node.inputs[0])
    beta, threshold = lower.aten_arg(node, 1, "beta", 1), lower.aten_arg(node, 2, "threshold", 20)
    scaled = x if beta == 1 else builder.op("Mul", x, builder.number(float(beta)))
    soft = builder.op("Softplus", scaled)
    if beta != 1:
        soft = builder.op("Div", soft, builder.number(float(beta)))
    large = builder.op("Greater", scaled, builder.number(float(threshold)))
    return builder.op("Where", large, x, soft)


@translation("aten.log_sigmoid")
def log_sigmoid(lower: Lowering, node: Node) -> ir.Value:
    """-softplus(-x): exp(-x) would overflow where x is far below zero."""
    builder = lower.builder
    return builder.op("Neg", builder.op("Softplus", builder.op("Neg", lower.whole(node.inputs[0]))))


@translation("aten.mish")
def mish(lower: Lowering, node: Node) -> ir.Value:
    builder, x = lower.builder, lower.whole(node.inputs[0])
    return builder.op("Mul", x, builder.op("Tanh", builder.op("Softplus", x)))


def _bent_below(lower: Lowering, x: ir.Value, alpha: float, scale: float, bend: float) -> ir.Value:
    """scale x above zero, scale alpha (exp(bend x) - 1) below."""
    builder = lower.builder

    def times(value: ir.Value, factor: float) -> ir.Value:
        return value if factor == 1 else builder.op("Mul", value, builder.number(factor))

    # What is above zero is left out of the exponential, which would overflow there.
    below = builder.op("Min", x, builder.number(0.0))
    bent = times(_expm1(lower, times(below, bend)), alpha * scale)
    positive = builder.op("Greater", x, builder.number(0.0))
    return builder.op("Where", positive, times(x, scale), bent)


@translation("aten.elu")
def elu(lower: Lowering, node: Node) -> ir.Value:
    names = ("alpha", "scale", "input_scale")
    numbers = [float(lower.aten_arg(node, i, name, 1)) for i, name in enumerate(names, start=1)]
    return _bent_below(lower, lower.whole(node.inputs[0]), *numbers)


@translation("aten.celu")
def celu(lower: Lowering, node: Node) -> ir.Value:
    alpha = float(lower.aten_arg(node, 1, "alpha", 1))
    return _bent_below(lower, lower.whole(node.inputs[0]), alpha, 1.0, 1 / alpha)


@translation("aten.selu")
def selu(lower: Lowering, node: Node) -> ir.Value:
    """Numbers: Klambauer et al., arXiv 1706.02515, section 2."""
    x = lower.whole(node.inputs[0])
    return _bent_below(lower, x, 1.6732632423543772, 1.0507009873554805, 1.0)


@translation("aten.leaky_relu")
def leaky_relu(lower: Lowering, node: Node) -> ir.Value:
    slope = float(lower.aten_arg(node, 1, "negative_slope", 0.01))
    return lower.builder.op("LeakyRelu", lower.whole(node.inputs[0]), alpha=slope)


@translation("aten.prelu")
def prelu(lower: Lowering, node: Node) -> ir.Value:
    """One slope for all, or one for each channel, which is the second axis."""
    builder = lower.builder
    x, slope = (lower.whole(value) for value in node.inputs[:2])
    rank = len(lower.types[node.outputs[0]].shape)
    if rank > 2:
        slope = builder.op("Reshape", slope, builder.constant([-1] + [1] * (rank - 2)))
    return builder.op("PRelu", x, slope)


def _hard_sigmoid(lower: Lowering, x: ir.Value) -> ir.Value:
    return lower.builder.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


@translation("aten.hardsigmoid")
def hardsigmoid(lower: Lowering, node: Node) -> ir.Value:
    return _hard_sigmoid(lower, lower.whole(node.inputs[0]))


@translation("aten.hardswish")
def hardswish(lower: Lowering, node: Node) -> ir.Value:
    x = lower.whole(node.inputs[0])
    return lower.builder.op("Mul", x, _hard_sigmoid(lower, x))


@translation("aten.relu6")
def relu6(lower: Lowering, node: Node) -> ir.Value:
    dtype = dtype_of(lower, node)
    x = lower.builder.op("Max", lower.whole(node.inputs[0]), lower.builder.number(0, dtype))
    return lower.builder.op("Min", x, lower.builder.number(6, dtype))


@translation("aten.glu")
def glu(lower: Lowering, node: Node) -> ir.Value:
    axis = lower.aten_arg(node, 1, "dim", -1)
    x, gate = lower.builder.op("Split", lower.whole(node.inputs[0]), outputs=2, axis=axis,
                               num_outputs=2)  # fmt: skip
    return lower.builder.op("Mul", x, lower.builder.op("Sigmoid", gate))


@translation("aten.silu")
def silu(lower: Lowering, node: Node) -> ir.Value:
    x = lower.whole(node.inputs[0])
    return lower.builder.op("Mul", x, lower.builder.op("Sigmoid", x))


@translation("aten.gelu")
def gelu(lower: Lowering, node: Node) -> ir.Value:
    kind = lower.aten_arg(node, 1, "approximate", "none")
    return lower.builder.op("Gelu", lower.whole(node.inputs[0]), approximate=kind)


# Clamps and odd values --------------------------------------------------------------------------


@translation("aten.clamp", "aten.clamp_min", "aten.clamp_max", "aten.hardtanh")
def clamp(lower: Lowering, node: Node) -> ir.Value:
    dtype = dtype_of(lower, node)
    low, high = lower.aten_arg(node, 1, "min"), lower.aten_arg(node, 2, "max")
    if ".hardtanh" in node.op:
        low, high = lower.aten_arg(node, 1, "min_val", -1), lower.aten_arg(node, 2, "max_val", 1)
    if ".clamp_max" in node.op:
        low, high = None, low
    x = operand(lower, lower.aten_arg(node, 0), dtype)
    if low is not None:
        x = lower.builder.op("Max", x, operand(lower, low, dtype))
    if high is not None:
        x = lower.builder.op("Min", x, operand(lower, high, dtype))
    return x


@translation("aten.isnan", "aten.isinf")
def is_odd(lower: Lowering, node: Node) -> ir.Value:
    x = operand(lower, node.inputs[0], torch.float32)
    return lower.builder.op("IsNaN" if ".isnan" in node.op else "IsInf", x)


@translation("aten.isfinite")
def isfinite(lower: Lowering, node: Node) -> ir.Value:
    builder, x = lower.builder, operand(lower, node.inputs[0], torch.float32)
    return builder.op("Not", builder.op("Or", builder.op("IsNaN", x), builder.op("IsInf", x)))


@translation("aten.nan_to_num")
def nan_to_num(lower: Lowering, node: Node) -> ir.Value:
    builder, x = lower.builder, lower.whole(node.inputs[0])
    most = torch.finfo(dtype_of(lower, node)).max
    names = ("nan", "posinf", "neginf")
    nan, top, bottom = (lower.aten_arg(node, i, name) for i, name in enumerate(names, start=1))

    def number(given: float | None, default: float) -> ir.Value:
        return builder.number(float(default if given is None else given))

    x = builder.op("Where", builder.op("IsNaN", x), number(nan, 0.0), x)
    above = builder.op("IsInf", x, detect_negative=0)
    x = builder.op("Where", above, number(top, most), x)
    below = builder.op("IsInf", x, detect_positive=0)
    return builder.op("Where", below, number(bottom, -most), x)
