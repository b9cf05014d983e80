"""Norms, fused with the sum in front of them where ONNX Runtime has one kernel for both."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.graph import Node, Value
from graphopt.lowering.onnx.builder import MICROSOFT
from graphopt.lowering.onnx.ops.registry import Heads, Lowered, Lowering, Sum, translation


def _gain(lower: Lowering, weight: Value | None, width: int, offset: float) -> ir.Value | None:
    """Return the gain as a vector; None where it does not broadcast along the last axis alone."""
    if weight is None:
        return lower.builder.constant(np.ones(width), np.float32)
    if len(lower.types[weight].shape) != 1:
        return None
    gain = lower.whole(weight)
    if not offset:
        return gain
    key = ("gain", gain, offset)
    if key not in lower.shared:
        lower.shared[key] = lower.builder.op("Add", gain, lower.builder.number(offset))
    return lower.shared[key]


def _pending(lower: Lowering, node: Node) -> Sum | None:
    """Return the sum that this norm reads, if nothing has asked for it before."""
    x = node.inputs[0]
    assert x is not None
    lowered = lower.values[x]
    return lowered if isinstance(lowered, Sum) and lowered.total is None else None


@translation("rms_norm")
def rms_norm(lower: Lowering, node: Node) -> Lowered:
    builder, attrs = lower.builder, lower.attrs(node)
    x, weight = node.inputs[0], node.operand(1)
    assert x is not None
    width = int(lower.types[x].shape[-1])
    gain = _gain(lower, weight, width, attrs.get("offset", 0.0))
    pending = _pending(lower, node)
    if pending is not None and gain is not None:
        y, _, _, pending.total = builder.op(
            "SkipSimplifiedLayerNormalization", pending.a, pending.b, gain,
            domain=MICROSOFT, outputs=4, without=(1, 2), epsilon=attrs["eps"],
        )  # fmt: skip
        return y
    lowered = lower.values[x]
    if isinstance(lowered, Heads) and gain is not None:
        split = builder.op(
            "Reshape", lowered.flat, builder.constant([0, 0, lowered.heads, lowered.dim])
        )
        y = builder.op("RMSNormalization", split, gain, axis=-1, epsilon=attrs["eps"])
        flat = builder.op("Reshape", y, builder.constant([0, 0, lowered.heads * lowered.dim]))
        return Heads(flat, lowered.heads, lowered.dim, lowered.heads_first)
    if gain is not None:
        return builder.op("RMSNormalization", lower.whole(x), gain, axis=-1, epsilon=attrs["eps"])
    ones = builder.constant(np.ones(width), np.float32)
    y = builder.op("RMSNormalization", lower.whole(x), ones, axis=-1, epsilon=attrs["eps"])
    scaled = lower.whole(weight)
    if attrs.get("offset"):
        scaled = builder.op("Add", scaled, builder.number(attrs["offset"]))
    return builder.op("Mul", y, scaled)


@translation("layer_norm")
def layer_norm(lower: Lowering, node: Node) -> Lowered:
    builder, attrs = lower.builder, lower.attrs(node)
    x, weight, bias = node.inputs[0], node.operand(1), node.operand(2)
    assert x is not None
    width = int(lower.types[x].shape[-1])
    gain = _gain(lower, weight, width, attrs.get("offset", 0.0))
    plain_bias = bias is None or len(lower.types[bias].shape) == 1
    pending = _pending(lower, node)
    shift = None if bias is None else lower.whole(bias)
    if pending is not None and gain is not None and plain_bias:
        y, _, _, pending.total = builder.op(
            "SkipLayerNormalization", pending.a, pending.b, gain, shift,
            domain=MICROSOFT, outputs=4, without=(1, 2), epsilon=attrs["eps"],
        )  # fmt: skip
        return y
    if gain is not None and plain_bias:
        return builder.op(
            "LayerNormalization", lower.whole(x), gain, shift, axis=-1, epsilon=attrs["eps"]
        )
    ones = builder.constant(np.ones(width), np.float32)
    y = builder.op("LayerNormalization", lower.whole(x), ones, axis=-1, epsilon=attrs["eps"])
    if weight is not None:
        y = builder.op("Mul", y, lower.whole(weight))
    return y if bias is None else builder.op("Add", y, lower.whole(bias))
