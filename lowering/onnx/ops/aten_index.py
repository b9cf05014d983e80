"""ATen indexing, sorting and expert products that capture did not raise."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import sympy
import torch

from graphopt.ir.graph import In, Node, Value
from graphopt.ir.types import Dim, dim
from graphopt.lowering.onnx.ops.aten import cast, dtype_of, operand
from graphopt.lowering.onnx.ops.registry import Lowering, translation


def _indices(lower: Lowering, node: Node) -> list[Value | None]:
    return [
        node.inputs[leaf.index] if isinstance(leaf, In) else None for leaf in node.attrs["args"][1]
    ]


@translation("aten.index.Tensor")
def index(lower: Lowering, node: Node) -> ir.Value:
    """x[i], x[i, j, ...] and x[:, i]; index tensors broadcast together."""
    builder, indices = lower.builder, _indices(lower, node)
    x = lower.whole(node.inputs[0])
    places = [axis for axis, item in enumerate(indices) if item is not None]
    if len(places) == 1:
        chosen = operand(lower, indices[places[0]], torch.int64)
        if lower.types[indices[places[0]]].dtype == torch.bool:  # type: ignore[index]
            raise ValueError("indexing by a bool tensor gives a size that depends on values")
        return builder.op("Gather", x, chosen, axis=places[0])
    if places != list(range(len(places))):
        raise ValueError("index tensors on axes that are not the first ones")
    return builder.op("GatherND", x, _coordinates(lower, node, indices))


def _coordinates(lower: Lowering, node: Node, indices: list[Value | None]) -> ir.Value:
    """Return index tensors, broadcast, as coordinates [..., axes]; negatives are wrapped."""
    builder = lower.builder
    parts = [operand(lower, item, torch.int64) for item in indices]
    total = parts[0]
    for part in parts[1:]:
        total = builder.op("Add", total, part)
    shape = builder.op("Shape", total)
    source = builder.op("Shape", lower.whole(node.inputs[0]))
    columns = []
    for axis, part in enumerate(parts):
        size = builder.op("Gather", source, builder.constant(axis), axis=0)
        negative = builder.op("Less", part, builder.constant(0))
        wrapped = builder.op("Where", negative, builder.op("Add", part, size), part)
        wide = builder.op("Expand", wrapped, shape)
        columns.append(builder.op("Unsqueeze", wide, builder.constant([-1])))
    return builder.op("Concat", *columns, axis=-1)


@translation("aten.index_put")
def index_put(lower: Lowering, node: Node) -> ir.Value:
    builder, indices = lower.builder, _indices(lower, node)
    if any(item is None for item in indices):
        raise ValueError("index_put with an axis left open")
    dtype = dtype_of(lower, node)
    values = operand(lower, lower.aten_arg(node, 2), dtype)
    places = _coordinates(lower, node, indices)
    rest = lower.types[node.output].shape[len(indices) :]
    lead = builder.op("Shape", places, start=0, end=-1)
    shape = builder.op("Concat", lead, builder.shape(rest), axis=0) if rest else lead
    wide = builder.op("Expand", values, shape)
    accumulate = bool(lower.aten_arg(node, 3, "accumulate", False))
    return builder.op(
        "ScatterND", lower.whole(node.inputs[0]), places, wide,
        reduction="add" if accumulate else "none",
    )  # fmt: skip


@translation("aten.index_select")
def index_select(lower: Lowering, node: Node) -> ir.Value:
    x, axis, chosen = (lower.aten_arg(node, i) for i in (0, 1, 2))
    return lower.builder.op("Gather", lower.whole(x), lower.whole(chosen), axis=axis)


@translation("aten.index_add")
def index_add(lower: Lowering, node: Node) -> ir.Value:
    if lower.aten_arg(node, 4, "alpha", 1) != 1:
        raise ValueError("index_add with a factor")
    return _to_rows(lower, node, reduction="add")


@translation("aten.index_copy")
def index_copy(lower: Lowering, node: Node) -> ir.Value:
    return _to_rows(lower, node)


def _to_rows(lower: Lowering, node: Node, **reduction: Any) -> ir.Value:
    """Write what an operator gives for rows that it chooses over these, or reduce it with them.

    Raises:
        ValueError: They are along another axis than the first.
    """
    builder = lower.builder
    x, axis, chosen, source = (lower.aten_arg(node, i) for i in range(4))
    if axis % len(lower.types[x].shape) != 0:
        raise ValueError(f"{node.op} on an axis other than the first")
    rows = builder.op("Unsqueeze", lower.whole(chosen), builder.constant([-1]))
    return builder.op("ScatterND", lower.whole(x), rows, lower.whole(source), **reduction)


@translation("aten.embedding")
def embedding(lower: Lowering, node: Node) -> ir.Value:
    weight, ids = lower.aten_arg(node, 0), lower.aten_arg(node, 1)
    return lower.builder.op("Gather", lower.whole(weight), lower.whole(ids), axis=0)


@translation("aten.gather")
def gather(lower: Lowering, node: Node) -> ir.Value:
    x, axis, chosen = (lower.aten_arg(node, i) for i in (0, 1, 2))
    return lower.builder.op("GatherElements", lower.whole(x), lower.whole(chosen), axis=axis)


@translation("aten.scatter", "aten.scatter_add")
def scatter(lower: Lowering, node: Node) -> ir.Value:
    builder = lower.builder
    axis, chosen, source = (lower.aten_arg(node, i) for i in (1, 2, 3))
    dtype = dtype_of(lower, node)
    x = operand(lower, lower.aten_arg(node, 0), dtype)
    values = operand(lower, source, dtype)
    if not isinstance(source, Value):
        shape = builder.op("Shape", lower.whole(chosen))
        values = builder.op("Expand", values, shape)
    reduction = "add" if ".scatter_add" in node.op else "none"
    return builder.op(
        "ScatterElements", x, lower.whole(chosen), values, axis=axis, reduction=reduction
    )


def _bound(place: Dim, size: Dim) -> Dim:
    """Return a bound of a slice counted from the start, and inside."""
    wrapped = place + size if isinstance(place, int) and place < 0 else place
    return dim(sympy.Max(0, sympy.Min(wrapped, size)))


@translation("aten.slice_scatter")
def slice_scatter(lower: Lowering, node: Node) -> ir.Value:
    """Write a slice of the last axes: by its positions along one axis."""
    builder = lower.builder
    x, source = lower.aten_arg(node, 0), lower.aten_arg(node, 1)
    axis = lower.aten_arg(node, 2, "dim", 0)
    start, end = lower.aten_arg(node, 3, "start") or 0, lower.aten_arg(node, 4, "end")
    step = lower.aten_arg(node, 5, "step", 1)
    sizes = lower.types[x].shape
    axis = axis % len(sizes)
    size = sizes[axis]
    first, last = _bound(start, size), _bound(size if end is None else end, size)
    places = builder.op(
        "Range", builder.scalar(first), builder.scalar(last), builder.constant(step)
    )
    column = [1] * len(sizes)
    column[axis] = -1
    shaped = builder.op("Reshape", places, builder.constant(column))
    wide = builder.op("Expand", shaped, builder.op("Shape", lower.whole(source)))
    return builder.op("ScatterElements", lower.whole(x), wide, lower.whole(source), axis=axis)


@translation("aten.one_hot")
def one_hot(lower: Lowering, node: Node) -> ir.Value:
    depth = lower.builder.constant(lower.aten_arg(node, 1))
    values = lower.builder.constant([0, 1])
    return lower.builder.op("OneHot", lower.whole(node.inputs[0]), depth, values, axis=-1)


@translation("aten.topk")
def topk(lower: Lowering, node: Node) -> list[ir.Value]:
    k, axis = lower.aten_arg(node, 1), lower.aten_arg(node, 2, "dim", -1)
    largest = int(bool(lower.aten_arg(node, 3, "largest", True)))
    return lower.builder.op(
        "TopK", lower.whole(node.inputs[0]), lower.builder.size(k), outputs=2,
        axis=axis, largest=largest,
    )  # fmt: skip


@translation("aten.sort", "aten.argsort")
def sort(lower: Lowering, node: Node) -> Any:
    """TopK of everything: ONNX has no sort. ONNX Runtime's is stable for equal entries."""
    builder, x = lower.builder, node.inputs[0]
    assert x is not None
    axis, largest = lower.aten_arg(node, 1, "dim", -1), lower.aten_arg(node, 2, "descending", False)
    if ".stable" in node.op:
        axis = lower.aten_arg(node, 2, "dim", -1)
        largest = lower.aten_arg(node, 3, "descending", False)
    size = lower.types[x].shape[axis]
    values, places = builder.op(
        "TopK", lower.whole(x), builder.size(size), outputs=2, axis=axis, largest=int(bool(largest))
    )
    return places if ".argsort" in node.op else [values, places]


@translation("aten.histc")
def histc(lower: Lowering, node: Node) -> ir.Value:
    """Counts of whole numbers 0 .. bins-1, which is how routers count tokens."""
    builder = lower.builder
    bins, low, high = (lower.aten_arg(node, i) for i in (1, 2, 3))
    if low != 0 or high != bins - 1:
        raise ValueError(f"histc over [{low}, {high}] with {bins} bins")
    x = operand(lower, lower.aten_arg(node, 0), torch.int64)
    rows = builder.op("Unsqueeze", x, builder.constant([-1]))
    numbers = builder.constant(list(range(bins)))
    hits = builder.op("Cast", builder.op("Equal", rows, numbers), to=ir.DataType.INT64)
    counts = builder.op("ReduceSum", hits, builder.constant([0]), keepdims=0)
    return cast(lower, counts, torch.int64, dtype_of(lower, node))


@translation("transformers.grouped_mm_fallback")
def grouped_mm(lower: Lowering, node: Node) -> ir.Value:
    """Rows [N, K] sorted by expert times weights [E, K, M]: each row its own expert's.

    Every expert multiplies all rows and a mask keeps its own, in a sum over experts: the
    standard ops have no product over groups of unequal size.
    """
    builder = lower.builder
    rows, weight, ends = (lower.aten_arg(node, i) for i in (0, 1, 2))
    experts = int(lower.types[weight].shape[0])
    size = lower.types[rows].shape[0]
    last = operand(lower, ends, torch.int64)
    numbers = builder.op("Range", builder.constant(0), builder.scalar(size), builder.constant(1))
    column = builder.op("Unsqueeze", numbers, builder.constant([-1]))
    passed = builder.op("Cast", builder.op("GreaterOrEqual", column, last), to=ir.DataType.INT64)
    own = builder.op("ReduceSum", passed, builder.constant([-1]), keepdims=1)
    mine = builder.op("Equal", own, builder.constant(list(range(experts))))
    keep = builder.op("Cast", mine, to=ir.DataType.FLOAT)
    keep = builder.op("Transpose", keep, perm=[1, 0])
    keep = builder.op("Unsqueeze", keep, builder.constant([-1]))
    products = builder.op("MatMul", builder.op("Mul", keep, lower.whole(rows)), lower.whole(weight))
    return builder.op("ReduceSum", products, builder.constant([0]), keepdims=0)


@translation("aten.masked_scatter")
def masked_scatter(lower: Lowering, node: Node) -> ir.Value:
    """Elements of a source, or whole rows, in the order of the places that are marked.

    Places behind as many as the source has keep what they hold, where torch refuses.
    """
    builder = lower.builder
    x, mask, source = (lower.aten_arg(node, place) for place in range(3))
    shape, marked = lower.types[x].shape, lower.whole(mask)
    by_rows = len(shape) > 1 and lower.types[mask].shape == (*shape[:-1], 1)
    kept = shape[:-1] if by_rows else shape
    if by_rows:
        marked = builder.op("Squeeze", marked, builder.constant([-1]))
    else:
        marked = builder.op("Expand", marked, builder.shape(shape))
    places = builder.op("Transpose", builder.op("NonZero", marked), perm=[1, 0])
    row = builder.shape([-1, *shape[len(kept) :]])
    values = builder.op("Reshape", lower.whole(source), row)
    first, counts = (
        builder.constant([0]),
        [builder.op("Shape", both, start=0, end=1) for both in (places, values)],
    )
    places = builder.op("Slice", places, first, counts[1])
    taken = builder.op("Slice", values, first, counts[0])
    made: ir.Value = builder.op("ScatterND", lower.whole(x), places, taken)
    return made
