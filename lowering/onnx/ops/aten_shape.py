"""ATen views, joins, casts and new tensors that capture did not raise."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch

from graphopt.ir.graph import In, Node, Value
from graphopt.ir.types import Dim
from graphopt.lowering.onnx.builder import ONNX_DTYPES
from graphopt.lowering.onnx.ops.aten import cast, dtype_of, operand
from graphopt.lowering.onnx.ops.registry import Lowering, translation

_END = 2**62


def _rank(lower: Lowering, value: Value | None) -> int:
    assert value is not None
    return len(lower.types[value].shape)


def _out_shape(lower: Lowering, node: Node, index: int = 0) -> tuple[Dim, ...]:
    return lower.types[node.outputs[index]].shape


@translation(
    "aten.reshape", "aten.view", "aten._unsafe_view", "aten.flatten", "aten.unflatten",
    "aten.squeeze", "aten.unsqueeze",
)  # fmt: skip
def reshape(lower: Lowering, node: Node) -> ir.Value:
    """Every change of shape alone: the exported output shape says all."""
    x = lower.whole(node.inputs[0])
    if ".unsqueeze." in node.op:
        return lower.builder.op("Unsqueeze", x, lower.builder.constant([lower.aten_arg(node, 1)]))
    return lower.builder.reshape(x, _out_shape(lower, node))


@translation("aten.transpose", "aten.swapaxes", "aten.swapdims")
def transpose(lower: Lowering, node: Node) -> ir.Value:
    rank = _rank(lower, node.inputs[0])
    order = list(range(rank))
    a, b = lower.aten_arg(node, 1), lower.aten_arg(node, 2)
    order[a], order[b] = order[b], order[a]
    return lower.builder.op("Transpose", lower.whole(node.inputs[0]), perm=order)


@translation("aten.movedim", "aten.moveaxis")
def movedim(lower: Lowering, node: Node) -> ir.Value:
    rank = _rank(lower, node.inputs[0])
    source, to = (
        [axis % rank for axis in (item if isinstance(item, list | tuple) else [item])]
        for item in (lower.aten_arg(node, 1), lower.aten_arg(node, 2))
    )
    rest = iter(axis for axis in range(rank) if axis not in source)
    order = [source[to.index(place)] if place in to else next(rest) for place in range(rank)]
    return lower.builder.op("Transpose", lower.whole(node.inputs[0]), perm=order)


@translation("aten.permute")
def permute(lower: Lowering, node: Node) -> ir.Value:
    rank = _rank(lower, node.inputs[0])
    order = [axis % rank for axis in lower.aten_arg(node, 1)]
    return lower.builder.op("Transpose", lower.whole(node.inputs[0]), perm=order)


@translation("aten.t", "aten.numpy_T", "aten.mT")
def turn(lower: Lowering, node: Node) -> ir.Value:
    rank = _rank(lower, node.inputs[0])
    order = list(range(rank))
    order = order[::-1] if ".mT." not in node.op else [*order[:-2], rank - 1, rank - 2]
    return lower.builder.op("Transpose", lower.whole(node.inputs[0]), perm=order)


@translation("aten.expand", "aten.expand_as", "aten.broadcast_to")
def expand(lower: Lowering, node: Node) -> ir.Value:
    x = lower.whole(node.inputs[0])
    return lower.builder.op("Expand", x, lower.builder.shape(_out_shape(lower, node)))


@translation("aten.repeat", "aten.tile")
def repeat(lower: Lowering, node: Node) -> ir.Value:
    counts = lower.aten_arg(node, 1)
    x, rank = lower.whole(node.inputs[0]), _rank(lower, node.inputs[0])
    extra = len(counts) - rank
    if extra:
        x = lower.builder.op("Unsqueeze", x, lower.builder.constant(list(range(extra))))
    return lower.builder.op("Tile", x, lower.builder.shape(counts))


@translation("aten.repeat_interleave.self_int")
def repeat_interleave(lower: Lowering, node: Node) -> ir.Value:
    """Repeat every entry along one axis: a new axis behind it, expanded and merged."""
    builder, x = lower.builder, lower.whole(node.inputs[0])
    count, axis = lower.aten_arg(node, 1), lower.aten_arg(node, 2, "dim")
    assert node.inputs[0] is not None
    sizes = list(lower.types[node.inputs[0]].shape)
    axis = axis % len(sizes)
    wide = builder.op("Unsqueeze", x, builder.constant([axis + 1]))
    wide = builder.op(
        "Expand", wide, builder.shape([*sizes[: axis + 1], count, *sizes[axis + 1 :]])
    )
    return builder.reshape(wide, _out_shape(lower, node))


@translation("aten.slice")
def slice_(lower: Lowering, node: Node) -> ir.Value:
    axis = lower.aten_arg(node, 1, "dim", 0)
    start = lower.aten_arg(node, 2, "start", 0)
    end, step = lower.aten_arg(node, 3, "end", _END), lower.aten_arg(node, 4, "step", 1)
    return _slice(lower, lower.whole(node.inputs[0]), axis, start, end, step)


def _slice(
    lower: Lowering, x: ir.Value, axis: int, start: Any, end: Any, step: int = 1
) -> ir.Value:
    builder = lower.builder
    bounds = [
        builder.size(0 if start is None else start),
        builder.size(_END if end is None else end),
    ]
    return builder.op("Slice", x, *bounds, builder.constant([axis]), builder.constant([step]))


@translation("aten.narrow")
def narrow(lower: Lowering, node: Node) -> ir.Value:
    axis, start, length = (lower.aten_arg(node, i) for i in (1, 2, 3))
    end = start + length
    # Counted from the end, a slice up to the end has no number for where it stops.
    return _slice(lower, lower.whole(node.inputs[0]), axis, start, None if end == 0 else end)


@translation("aten.select")
def select(lower: Lowering, node: Node) -> ir.Value:
    axis, index = lower.aten_arg(node, 1), lower.aten_arg(node, 2)
    return lower.builder.op(
        "Gather", lower.whole(node.inputs[0]), lower.builder.scalar(index), axis=axis
    )


@translation("aten.split", "aten.chunk", "aten.split_with_sizes", "aten.tensor_split")
def split(lower: Lowering, node: Node) -> list[ir.Value]:
    axis = lower.aten_arg(node, 2, "dim", 0)
    sizes = [lower.types[value].shape[axis] for value in node.outputs]
    if len(sizes) == 1:
        return [lower.whole(node.inputs[0])]
    x = lower.whole(node.inputs[0])
    return lower.builder.op("Split", x, lower.builder.shape(sizes), outputs=len(sizes), axis=axis)


@translation("aten.unbind")
def unbind(lower: Lowering, node: Node) -> list[ir.Value]:
    axis = lower.aten_arg(node, 1, "dim", 0)
    x = lower.whole(node.inputs[0])
    return [
        lower.builder.op("Gather", x, lower.builder.constant(index), axis=axis)
        for index in range(len(node.outputs))
    ]


def _list(lower: Lowering, node: Node) -> list[ir.Value]:
    dtype = dtype_of(lower, node)
    items = [node.inputs[leaf.index] for leaf in node.attrs["args"][0] if isinstance(leaf, In)]
    return [operand(lower, item, dtype) for item in items]


@translation("aten.flip")
def flip(lower: Lowering, node: Node) -> ir.Value:
    builder, axes = lower.builder, list(lower.aten_arg(node, 1))
    starts, ends, steps = (builder.constant([n] * len(axes)) for n in (-1, -_END, -1))
    return builder.op("Slice", lower.whole(node.inputs[0]), starts, ends,
                      builder.constant(axes), steps)  # fmt: skip


@translation("aten.roll")
def roll(lower: Lowering, node: Node) -> ir.Value:
    """Put what leaves an axis at its end to its beginning, by as much as it is long at most."""
    builder, x = lower.builder, lower.whole(node.inputs[0])
    shifts, dims = lower.aten_arg(node, 1), lower.aten_arg(node, 2, "dims", [])
    if not dims:
        raise ValueError("rolling a whole tensor has no ONNX form here")
    shape = _out_shape(lower, node)
    for shift, axis in zip(shifts, dims, strict=True):
        size = builder.op("Unsqueeze", builder.scalar(shape[axis]), builder.constant([0]))
        count = builder.op("Mod", builder.constant([shift]), size)
        cut, at = builder.op("Sub", size, count), builder.constant([axis])
        last = builder.op("Slice", x, cut, builder.constant([_END]), at)
        x = builder.op("Concat", last, builder.op("Slice", x, builder.constant([0]), cut, at),
                       axis=axis)  # fmt: skip
    return x


@translation("aten.cat", "aten.concat")
def cat(lower: Lowering, node: Node) -> ir.Value:
    return lower.builder.op("Concat", *_list(lower, node), axis=lower.aten_arg(node, 1, "dim", 0))


@translation("aten.stack")
def stack(lower: Lowering, node: Node) -> ir.Value:
    axis = lower.aten_arg(node, 1, "dim", 0)
    axes = lower.builder.constant([axis])
    parts = [lower.builder.op("Unsqueeze", part, axes) for part in _list(lower, node)]
    return lower.builder.op("Concat", *parts, axis=axis)


@translation("aten.pad", "aten.constant_pad_nd")
def pad(lower: Lowering, node: Node) -> ir.Value:
    sizes = list(lower.aten_arg(node, 1))
    mode = lower.aten_arg(node, 2, "mode", "constant") if ".pad." in node.op else "constant"
    place = 3 if ".pad." in node.op else 2
    fill = lower.aten_arg(node, place, "value", 0) or 0
    if mode != "constant":
        raise ValueError(f"padding by {mode!r} has no ONNX form here")
    axes = [-1 - index for index in range(len(sizes) // 2)]
    before = [sizes[2 * index] for index in range(len(axes))]
    after = [sizes[2 * index + 1] for index in range(len(axes))]
    dtype = dtype_of(lower, node)
    return lower.builder.op(
        "Pad", lower.whole(node.inputs[0]), lower.builder.shape([*before, *after]),
        lower.builder.number(fill, dtype), lower.builder.constant(axes),
    )  # fmt: skip


@translation(
    "aten.to", "aten._to_copy", "aten.type_as", "aten.clone", "aten.contiguous",
    "aten.detach", "aten.alias", "aten.dropout", "aten.lift_fresh_copy", "aten.copy",
)  # fmt: skip
def convert(lower: Lowering, node: Node) -> ir.Value:
    """Casts, and what only matters to torch's memory."""
    if ".copy." in node.op:
        source = operand(lower, lower.aten_arg(node, 1), dtype_of(lower, node))
        shape = lower.builder.shape(_out_shape(lower, node))
        return lower.builder.op("Expand", source, shape)
    x = lower.aten_arg(node, 0)
    return cast(lower, lower.whole(x), lower.types[x].dtype, dtype_of(lower, node))


# New tensors ------------------------------------------------------------------------------------


def _filled(lower: Lowering, node: Node, fill: Any) -> ir.Value:
    dtype = dtype_of(lower, node)
    shape = lower.builder.shape(_out_shape(lower, node))
    return lower.builder.op("Expand", operand(lower, fill, dtype), shape)


@translation("aten.full", "aten.new_full", "aten.full_like")
def full(lower: Lowering, node: Node) -> ir.Value:
    return _filled(
        lower, node, lower.aten_arg(node, 2 if ".new_full" in node.op else 1, "fill_value")
    )


@translation("aten.ones", "aten.new_ones", "aten.ones_like")
def ones(lower: Lowering, node: Node) -> ir.Value:
    return _filled(lower, node, 1)


@translation("aten.zeros", "aten.new_zeros", "aten.zeros_like")
def zeros(lower: Lowering, node: Node) -> ir.Value:
    return _filled(lower, node, 0)


@translation("aten.scalar_tensor")
def scalar_tensor(lower: Lowering, node: Node) -> ir.Value:
    return operand(lower, lower.aten_arg(node, 0), dtype_of(lower, node))


@translation("aten.arange")
def arange(lower: Lowering, node: Node) -> ir.Value:
    args = list(node.attrs["args"])
    start, end, step = 0, args[0], 1
    if ".start" in node.op:
        start, end = args[0], args[1]
        step = args[2] if len(args) > 2 else 1
    dtype = dtype_of(lower, node)
    kind = dtype if dtype in (torch.int64, torch.float32) else torch.int64
    first, last, stride = (operand(lower, item, kind) for item in (start, end, step))
    return cast(lower, lower.builder.op("Range", first, last, stride), kind, dtype)


@translation("aten.eye")
def eye(lower: Lowering, node: Node) -> ir.Value:
    """Ones where the row's number is the column's."""
    builder = lower.builder
    rows, columns = (
        builder.op("Range", builder.constant(0), builder.scalar(size), builder.constant(1))
        for size in _out_shape(lower, node)
    )
    same = builder.op("Equal", builder.op("Unsqueeze", rows, builder.constant([1])), columns)
    return cast(lower, same, torch.bool, dtype_of(lower, node))


@translation("aten.tril", "aten.triu")
def triangle(lower: Lowering, node: Node) -> ir.Value:
    dtype = dtype_of(lower, node)
    x = operand(lower, lower.aten_arg(node, 0), torch.int64 if dtype == torch.bool else dtype)
    diagonal = lower.aten_arg(node, 1, "diagonal", 0)
    offset = (
        lower.builder.scalar(diagonal)
        if isinstance(diagonal, sympy.Expr)
        else lower.builder.constant(np.int64(diagonal))
    )
    result = lower.builder.op("Trilu", x, offset, upper=int(".triu" in node.op))
    return lower.builder.op("Cast", result, to=ONNX_DTYPES[dtype])
