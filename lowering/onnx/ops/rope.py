"""Rotary position embedding."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.graph import Node
from graphopt.lowering.onnx.ops.registry import Heads, Lowered, Lowering, translation


@translation("rope_table")
def rope_table(lower: Lowering, node: Node) -> list[Lowered]:
    builder = lower.builder
    positions, inv_freq = lower.whole(node.inputs[0]), lower.whole(node.inputs[1])
    wide = builder.op("Cast", positions, to=ir.DataType.FLOAT)
    column = builder.op("Unsqueeze", wide, builder.constant([2]))
    angles = builder.op("Mul", column, inv_freq)
    tables = [builder.op("Cos", angles), builder.op("Sin", angles)]
    scale = lower.attrs(node).get("scale", 1.0)
    if scale != 1.0:
        tables = [builder.op("Mul", table, builder.number(scale)) for table in tables]
    return tables


@translation("rope")
def rope(lower: Lowering, node: Node) -> Lowered:
    builder, attrs = lower.builder, lower.attrs(node)
    x, cos = node.inputs[0], node.inputs[1]
    assert x is not None and cos is not None
    rotated = 2 * int(lower.types[cos].shape[-1])
    first = attrs.get("heads_first", True)
    lowered = lower.values[x]
    if not isinstance(lowered, Heads):
        if first:
            lowered = lower.heads(x)
        else:
            _, _, heads, width = (size for size in lower.types[x].shape)
            shape = builder.constant([0, 0, int(heads) * int(width)])
            lowered = Heads(
                builder.op("Reshape", lower.whole(x), shape), int(heads), int(width), False
            )
    flat = builder.op(
        "RotaryEmbedding",
        lowered.flat,
        lower.whole(node.inputs[1]),
        lower.whole(node.inputs[2]),
        num_heads=lowered.heads,
        interleaved=int(attrs.get("interleaved", False)),
        rotary_embedding_dim=0 if rotated == lowered.dim else rotated,
    )
    return Heads(flat, lowered.heads, lowered.dim, lowered.heads_first)
