"""Activations rounded to few bits; what reads them decides whether they become integers."""

from __future__ import annotations

import onnx_ir as ir
import torch

from graphopt.ir.graph import Node, Value
from graphopt.lowering.onnx.ops.registry import Heads, Lowered, Lowering, translation
from graphopt.lowering.onnx.rounded import Rounded


@translation("quantise_dequantise")
def quantise_dequantise(lower: Lowering, node: Node) -> Lowered:
    """A head of a token is rounded by itself, and so stays flat where it is."""
    attrs, builder = lower.attrs(node), lower.builder
    bits, symmetric = attrs["bits"], attrs["symmetric"]
    x, clips = node.inputs[0], (node.operand(1), node.operand(2))
    assert x is not None
    heads = lower.values[x]
    if isinstance(heads, Heads) and clips == (None, None):
        split = builder.op("Reshape", heads.flat, builder.constant([0, 0, heads.heads, heads.dim]))
        rounded = Rounded(_wide(lower, x, split), (None, None), bits, symmetric)
        width = heads.heads * heads.dim
        flat = builder.op("Reshape", rounded.whole(builder), builder.constant([0, 0, width]))
        return Heads(flat, heads.heads, heads.dim, heads.heads_first)
    low, high = (None if clip is None else _wide(lower, clip, lower.whole(clip)) for clip in clips)
    return Rounded(_wide(lower, x, lower.whole(x)), (low, high), bits, symmetric)


def _wide(lower: Lowering, value: Value, tensor: ir.Value) -> ir.Value:
    """Return a value's tensor in fp32, in which codes are computed."""
    if lower.types[value].dtype == torch.float32:
        return tensor
    wide: ir.Value = lower.builder.op("Cast", tensor, to=ir.DataType.FLOAT)
    return wide
