"""Gates of experts, and experts as one feed-forward part whose other neurons are put to 0."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.graph import Node, Value
from graphopt.lowering.onnx.builder import MICROSOFT
from graphopt.lowering.onnx.ops.registry import Lowering, translation, translation_of


def activation(lower: Lowering, act: str, x: ir.Value) -> ir.Value:
    """Return an activation of a value, in the form that the op itself has."""
    value = Value("hidden")
    lower.values[value] = x
    form = translation_of(act)
    assert form is not None
    made = form(lower, Node(act, [value], {}))
    assert isinstance(made, ir.Value)
    return made


@translation("top_gates")
def top_gates(lower: Lowering, node: Node) -> ir.Value:
    """TopK, whose first of equal values is the lowest index, and a one in each of its places.

    With a mean in place of a count, a one where something is above 0.
    """
    builder, attrs = lower.builder, lower.attrs(node)
    scores = lower.whole(node.inputs[0])
    bias, extra = lower.operand(node, 1), lower.operand(node, 2)
    odds = None if bias is None and extra is None else builder.op("Softmax", scores, axis=-1)
    nothing, one = builder.number(0.0), builder.number(1.0)
    if attrs.get("mean"):
        ranked = scores if bias is None else builder.op("Add", scores, lower.whole(bias))
        chosen = builder.op("Where", builder.op("Greater", ranked, nothing), one, nothing)
    else:
        ranked = scores if bias is None else builder.op("Add", odds, lower.whole(bias))
        count = builder.constant([attrs["count"]])
        _, places = builder.op("TopK", ranked, count, outputs=2, axis=-1, largest=1, sorted=1)
        nothing = builder.op("Expand", nothing, builder.op("Shape", scores))
        ones = builder.op("Expand", one, builder.op("Shape", places))
        chosen = builder.op("ScatterElements", nothing, places, ones, axis=-1)
    if extra is None:
        return chosen
    gate = builder.op("Mul", odds, lower.whole(extra))
    return builder.op("Mul", chosen, builder.op("Add", gate, one))


@translation("experts")
def experts(lower: Lowering, node: Node) -> ir.Value:
    builder, attrs = lower.builder, lower.attrs(node)
    x, gates = lower.whole(node.inputs[0]), lower.whole(node.inputs[1])
    up, down, gate = node.inputs[2], node.inputs[3], lower.operand(node, 4)
    assert up is not None and down is not None
    hidden = _product(lower, x, up, lower.operand(node, 5))
    if gate is None:
        hidden = activation(lower, attrs["act"], hidden)
    else:
        first = activation(lower, attrs["act"], _product(lower, x, gate, lower.operand(node, 6)))
        hidden = builder.op("Mul", first, hidden)
    count = int(lower.types[node.inputs[1]].shape[-1])  # type: ignore[index]
    size = int(lower.types[up].shape[0]) // count
    of_neuron = builder.constant(np.arange(count).repeat(size))
    hidden = builder.op("Mul", hidden, builder.op("Gather", gates, of_neuron, axis=-1))
    return _product(lower, hidden, down, None)


def _product(lower: Lowering, x: ir.Value, weight: Value, bias: Value | None) -> ir.Value:
    builder, stored = lower.builder, lower.whole(weight)
    product = builder.op("FusedMatMul", x, stored, domain=MICROSOFT, transB=1)
    return product if bias is None else builder.op("Add", product, lower.whole(bias))
