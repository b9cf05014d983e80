"""Rotary position embedding."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.graph import Node
from graphopt.lowering.onnx.ops.registry import Heads, Lowered, Lowering, translation


@translation("rope_table")
def rope_table(lower: Lowering, node: Node) -> list[Lowered]:
    """Cosines and sines of the new tokens' positions, [B, S, R/2], computed in the graph.

    Made once for all layers, they cost nothing beside a layer, hold for positions of any size,
    and need no constants by position.
    """
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


def _longest(lower: Lowering, positions: ir.Value) -> ir.Value:
    """Return the number of tokens of the longest sequence, new ones included, int64 scalar."""
    key = ("longest", positions)
    if key not in lower.shared:
        builder = lower.builder
        newest = builder.op("ReduceMax", positions, keepdims=0)
        lower.shared[key] = builder.op("Add", newest, builder.constant(1))
    return lower.shared[key]  # type: ignore[return-value]


@translation("by_length")
def by_length(lower: Lowering, node: Node) -> ir.Value:
    """A choice between two small tensors; a table of every position for each would be large."""
    builder = lower.builder
    positions, short, long = (lower.whole(value) for value in node.inputs)
    length = builder.constant(lower.attrs(node)["length"])
    beyond = builder.op("Greater", _longest(lower, positions), length)
    return builder.op("Where", beyond, long, short)


@translation("ntk_frequencies")
def ntk_frequencies(lower: Lowering, node: Node) -> ir.Value:
    builder, attrs = lower.builder, lower.attrs(node)
    positions, exponents = (lower.whole(value) for value in node.inputs)
    rotated = 2 * int(lower.types[node.output].shape[0])
    longest = builder.op("Max", _longest(lower, positions), builder.constant(attrs["length"]))
    stretch = builder.op("Cast", longest, to=ir.DataType.FLOAT)
    for op, number in (
        ("Mul", attrs["factor"]),
        ("Div", attrs["length"]),
        ("Sub", attrs["factor"] - 1),
        ("Pow", rotated / (rotated - 2)),
        ("Mul", attrs["base"]),
    ):
        stretch = builder.op(op, stretch, builder.number(number))
    return builder.op("Reciprocal", builder.op("Pow", stretch, exponents))


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
