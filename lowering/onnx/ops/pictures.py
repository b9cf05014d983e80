"""Positions of three axes, and masks of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.ir.graph import Node
from graphopt.lowering.onnx.ops.registry import Lowered, Lowering, translation
from graphopt.lowering.onnx.ops.rope import rope_table


@translation("axial_rope_table")
def axial_rope_table(lower: Lowering, node: Node) -> Lowered | Sequence[Lowered]:
    """The tables of three axes: each axis's angles by its own frequencies, side by side."""
    assert node.inputs[0] is not None
    if len(lower.types[node.inputs[0]].shape) == 2:
        return rope_table(lower, node)
    builder, attrs = lower.builder, lower.attrs(node)
    positions, inv_freq = lower.whole(node.inputs[0]), lower.whole(node.inputs[1])
    wide = builder.op("Cast", positions, to=ir.DataType.FLOAT)
    parts, first = [], 0
    for axis, name in enumerate(("time", "height", "width")):
        stop = first + attrs[name]
        place = builder.op("Gather", wide, builder.constant(axis), axis=0)
        column = builder.op("Unsqueeze", place, builder.constant([2]))
        ends = (builder.constant([first]), builder.constant([stop]))
        own = builder.op("Slice", inv_freq, *ends)
        parts.append(builder.op("Mul", column, own))
        first = stop
    angles = builder.op("Concat", *parts, axis=-1)
    tables = [builder.op("Cos", angles), builder.op("Sin", angles)]
    scale = attrs.get("scale", 1.0)
    if scale != 1.0:
        tables = [builder.op("Mul", table, builder.number(scale)) for table in tables]
    return tables


@translation("picture_mask")
def picture_mask(lower: Lowering, node: Node) -> ir.Value:
    """Comparisons of the pictures of keys and queries, beside those of their places."""
    builder, window = lower.builder, lower.attrs(node).get("window")
    assert node.inputs[1] is not None
    pictures, tokens = lower.whole(node.inputs[0]), lower.whole(node.inputs[1])
    zero, one = builder.constant(0), builder.constant(1)
    count = builder.op("Shape", pictures, start=1, end=2)
    new = builder.op("Shape", tokens, start=1, end=2)
    old = builder.op("Sub", count, new)
    total = builder.op("Squeeze", count)
    keys = builder.op("Range", zero, total, one)
    queries = builder.op("Range", builder.op("Squeeze", old), total, one)
    queries = builder.op("Unsqueeze", queries, builder.constant([1]))
    newest = builder.op("Slice", pictures, old, count, builder.constant([1]))
    own = builder.op("Unsqueeze", newest, builder.constant([2]))
    theirs = builder.op("Unsqueeze", pictures, builder.constant([1]))
    one_picture = builder.op(
        "And", builder.op("Equal", own, theirs), builder.op("GreaterOrEqual", own, zero)
    )
    seen = builder.op("Or", builder.op("LessOrEqual", keys, queries), one_picture)
    if window is not None:
        first = builder.op("Sub", queries, builder.constant(window))
        seen = builder.op("And", seen, builder.op("Greater", keys, first))
    bias = builder.op("Where", seen, builder.number(0.0), builder.number(float("-inf")))
    made: ir.Value = builder.op("Unsqueeze", bias, builder.constant([1]))
    return made
