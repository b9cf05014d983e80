"""Activations rounded to few bits, in plain operators whose results are those of the torch form."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from graphopt.ir.graph import Node, Value
from graphopt.lowering.onnx.builder import GRAPHOPT, OPSET
from graphopt.lowering.onnx.ops.registry import Lowered, Lowering, translation


class _Body:
    """The nodes of a function's body, in fp32."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)  # type: ignore[arg-type]
        self.nodes.append(node)
        return node.outputs[0]

    def number(self, value: float) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.float32(value)))

    def axis(self) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.array([-1], np.int64)))


@translation("quantise_dequantise")
def quantise_dequantise(lower: Lowering, node: Node) -> Lowered:
    """A local function for every way to round; `graphopt.ir.functional` has the same formula."""
    attrs, builder = lower.attrs(node), lower.builder
    bits, symmetric = attrs["bits"], attrs["symmetric"]
    x, *clips = node.inputs[0], node.operand(1), node.operand(2)
    which = [name for name, clip in zip(("Low", "High"), clips, strict=True) if clip is not None]
    name = f"QuantiseDequantise{bits}" + "".join(
        ["" if symmetric else "Asymmetric", *(f"Clip{name}" for name in which)]
    )
    function = builder.functions.get(name) or _function(name, bits, symmetric, which)
    operands = [_wide(lower, value) for value in (x, *clips) if value is not None]
    y = builder.call(function, *operands)
    narrow = lower.types[node.output].dtype
    return y if narrow == torch.float32 else builder.op("CastLike", y, lower.whole(x))


def _wide(lower: Lowering, value: Value) -> ir.Value:
    """Return a value in fp32."""
    tensor = lower.whole(value)
    if lower.types[value].dtype == torch.float32:
        return tensor
    wide: ir.Value = lower.builder.op("Cast", tensor, to=ir.DataType.FLOAT)
    return wide


def _function(name: str, bits: int, symmetric: bool, clips: list[str]) -> ir.Function:
    """Return the rounding of the last axis as a function of x and of the clips that there are."""
    body = _Body()
    x, given = ir.Value(name="x"), {clip: ir.Value(name=f"clip_{clip.lower()}") for clip in clips}
    axis, nought = body.axis(), body.number(0.0)
    if symmetric and not clips:
        low, high = None, body.op("ReduceMax", body.op("Abs", x), axis, keepdims=1)
    else:
        low = body.op("Min", body.op("ReduceMin", x, axis, keepdims=1), nought)
        high = body.op("Max", body.op("ReduceMax", x, axis, keepdims=1), nought)
        low = body.op("Mul", low, given["Low"]) if "Low" in given else low
        high = body.op("Mul", high, given["High"]) if "High" in given else high
    if symmetric:
        first, last = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        reach = high if low is None else body.op("Max", high, body.op("Neg", low))
        scale = body.op("Div", reach, body.number(last))
    else:
        assert low is not None
        first, last = 0, 2**bits - 1
        scale = body.op("Div", body.op("Sub", high, low), body.number(last))
    scale = body.op("Where", body.op("Equal", scale, nought), body.number(1.0), scale)
    codes = body.op("Round", body.op("Div", x, scale))
    if symmetric:
        values = body.op("Clip", codes, body.number(first), body.number(last))
    else:
        assert low is not None
        zero = body.op("Round", body.op("Div", body.op("Neg", low), scale))
        limits = body.number(first), body.number(last)
        values = body.op("Sub", body.op("Clip", body.op("Add", codes, zero), *limits), zero)
    y = body.op("Mul", values, scale)
    graph = ir.Graph(
        [x, *given.values()], [y], nodes=body.nodes, opset_imports={"": OPSET}, name=name
    )
    return ir.Function(GRAPHOPT, name, graph=graph, attributes=[])
