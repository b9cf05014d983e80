"""Elementwise ops. What ONNX has no single op for is a function of the graphopt domain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.ir.graph import Node
from graphopt.lowering.onnx.builder import GRAPHOPT, MICROSOFT, OPSET
from graphopt.lowering.onnx.ops.registry import Lowered, Lowering, Sum, translation


def _simple(name: str, op_type: str) -> None:
    @translation(name)
    def form(lower: Lowering, node: Node) -> ir.Value:
        return lower.builder.op(op_type, *(lower.whole(value) for value in node.inputs))


for _name, _op_type in {
    "abs": "Abs",
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "mul": "Mul",
}.items():
    _simple(_name, _op_type)


@translation("add")
def add(lower: Lowering, node: Node) -> Lowered:
    a, b = (lower.whole(value) for value in node.inputs)
    kinds = {lower.types[v] for v in (*node.inputs, node.output) if v is not None}
    if len(kinds) == 1 and len(lower.types[node.output].shape) == 3:
        return Sum(a, b)
    return lower.builder.op("Add", a, b)


@translation("gelu")
def gelu(lower: Lowering, node: Node) -> ir.Value:
    return lower.builder.op("Gelu", lower.whole(node.inputs[0]))


@translation("gelu_tanh")
def gelu_tanh(lower: Lowering, node: Node) -> ir.Value:
    return lower.builder.op("Gelu", lower.whole(node.inputs[0]), approximate="tanh")


@translation("silu")
def silu(lower: Lowering, node: Node) -> ir.Value:
    """QuickGelu with alpha 1 is x sigmoid(x) in one kernel."""
    return lower.builder.op("QuickGelu", lower.whole(node.inputs[0]), domain=MICROSOFT, alpha=1.0)


@translation("quick_gelu")
def quick_gelu(lower: Lowering, node: Node) -> ir.Value:
    return lower.builder.op("QuickGelu", lower.whole(node.inputs[0]), domain=MICROSOFT, alpha=1.702)


@translation("scale")
def scale(lower: Lowering, node: Node) -> Lowered:
    factor = lower.attrs(node)["factor"]
    x = node.inputs[0]
    assert x is not None
    return lower.builder.op(
        "Mul", lower.whole(x), lower.builder.number(factor, lower.types[x].dtype)
    )


def _function(name: str, body: Callable[[ir.Value], list[ir.Node]]) -> ir.Function:
    """Return a local function of one input, its body in standard ops."""
    x = ir.Value(name="x")
    nodes = body(x)
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, opset_imports={"": OPSET}, name=name)
    return ir.Function(GRAPHOPT, name, graph=graph, attributes=[])


@translation("relu2")
def relu2(lower: Lowering, node: Node) -> ir.Value:
    def body(x: ir.Value) -> list[ir.Node]:
        positive = ir.node("Relu", [x])
        return [positive, ir.node("Mul", [positive.outputs[0], positive.outputs[0]])]

    function = lower.builder.functions.get("Relu2") or _function("Relu2", body)
    return lower.builder.call(function, lower.whole(node.inputs[0]))


@translation("softcap")
def softcap(lower: Lowering, node: Node) -> ir.Value:
    """One function a cap, since a function body has no arithmetic on attributes."""
    cap = lower.attrs(node)["cap"]

    def body(x: ir.Value) -> list[ir.Node]:
        limit = ir.node("Constant", [], {"value": ir.tensor(np.float32(cap))})
        ratio = ir.node("Div", [x, limit.outputs[0]])
        bent = ir.node("Tanh", [ratio.outputs[0]])
        return [limit, ratio, bent, ir.node("Mul", [bent.outputs[0], limit.outputs[0]])]

    digits = str(np.float32(cap)).removesuffix(".0")
    name = f"Softcap_{digits}".replace(".", "_").replace("-", "m").replace("+", "")
    function = lower.builder.functions.get(name) or _function(name, body)
    return lower.builder.call(function, lower.whole(node.inputs[0]))
