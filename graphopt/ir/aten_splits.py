"""Which axes ATen operators split together, and their arguments for a rank's parts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from graphopt.ir.mixture import GROUPED_PRODUCTS
from graphopt.ir.ops.base import Attrs
from graphopt.ir.resize import factors
from graphopt.ir.split import Alignment, Kinds, Layout, Split, pointwise
from graphopt.ir.types import Dim, numel

_POINTWISE = frozenset(
    {"add", "sub", "rsub", "mul", "div", "pow", "neg", "abs", "sign", "exp", "log", "sqrt", "rsqrt",
     "reciprocal", "square", "sigmoid", "tanh", "silu", "relu", "gelu", "erf", "sin", "cos",
     "softplus", "clamp", "clamp_min", "clamp_max", "where", "masked_fill", "maximum", "minimum",
     "to", "_to_copy", "clone", "contiguous", "alias", "detach", "gt", "lt", "ge", "le", "eq", "ne",
     "logical_and", "logical_or", "logical_not", "bitwise_not", "bitwise_and", "bitwise_or",
     "zeros_like", "ones_like", "full_like", "leaky_relu", "elu", "mish", "hardswish", "fmod",
     "remainder", "floor", "round", "expm1", "log1p"}
)  # fmt: skip
_RESHAPES = frozenset({"reshape", "view", "_unsafe_view", "flatten", "unflatten", "reshape_copy"})
_REDUCTIONS = frozenset({"sum", "mean", "amax", "amin", "softmax", "_softmax", "log_softmax"})
_FILLED = frozenset({"new_zeros", "new_full", "new_ones"})
_END = 2**62
"""Where a slice ends that has no end."""


def _name(op: str) -> str:
    return op.split(".")[1]


def _argument(attrs: Attrs, place: int, name: str, default: Any = None) -> Any:
    args = attrs["args"]
    return args[place] if place < len(args) else attrs.get("kwargs", {}).get(name, default)


def _axis(value: int, kind: Sequence[Dim]) -> int:
    return value % len(kind) if kind else 0


def aten_alignments(op: str, attrs: Attrs, operands: Kinds, results: Kinds) -> Iterator[Alignment]:
    """Yield the alignments of an ATen operator; see `graphopt.ir.splits.alignments`."""
    if op in GROUPED_PRODUCTS:
        yield Alignment({1: Split(2)}, {0: Split(1)})
        yield Alignment({0: Split(1), 1: Split(1)}, sums=(0,))
        return
    name, made = _name(op), results[0]
    if made is None:
        return
    source = operands[0] if operands else None
    if name in _POINTWISE or op in ("aten.min.other", "aten.max.other"):
        yield from pointwise(operands, results)
    elif name in _FILLED:
        yield from pointwise((), results)
    elif source is None:
        return
    elif name in _RESHAPES:
        yield from _reshaped(source.shape, made.shape)
    elif name in ("transpose", "permute", "t", "mT"):
        order = _order(name, attrs, len(source.shape))
        for axis, before in enumerate(order):
            yield Alignment({0: Split(before)}, {0: Split(axis)})
    elif name in ("unsqueeze", "squeeze"):
        yield from _reshaped(source.shape, made.shape)
    elif name == "expand":
        yield from pointwise(operands, results)
    elif name in ("slice", "split_with_sizes", "split", "chunk", "select", "repeat_interleave"):
        yield from _CUTS[name](attrs, source.shape, results)
    elif name in ("cat", "stack"):
        yield from _joined(name, attrs, operands, made.shape)
    elif name == "slice_scatter":
        axis = _axis(_argument(attrs, 2, "dim", 0), source.shape)
        yield from (a for a in pointwise(operands, results) if a.results[0].axis != axis)
    elif name in ("index", "index_select"):
        yield from _indexed(name, attrs, source.shape, made.shape)
    elif name in _REDUCTIONS:
        yield from _reduced(attrs, source.shape, results)
    elif name in ("bmm", "matmul", "mm"):
        yield from _product(operands, made.shape)


def _reshaped(source: Sequence[Dim], made: Sequence[Dim]) -> Iterator[Alignment]:
    for inner, outer in factors(source, made):
        if numel(source[axis] for axis in inner) != numel(made[axis] for axis in outer):
            continue
        # Equal parts of the first axis are equal parts of all that it is put together with.
        first = next((axis for axis in inner if source[axis] != 1), inner[0])
        leading = next((axis for axis in outer if made[axis] != 1), outer[0])
        if isinstance(source[first], int) and isinstance(made[leading], int):
            yield Alignment({0: Split(first)}, {0: Split(leading)})


def _order(name: str, attrs: Attrs, rank: int) -> list[int]:
    if name == "permute":
        return [axis % rank for axis in _argument(attrs, 1, "dims")]
    order = list(range(rank))
    pair = (
        (-1, -2)
        if name in ("t", "mT")
        else (_argument(attrs, 1, "dim0"), _argument(attrs, 2, "dim1"))
    )
    first, second = (axis % rank for axis in pair)
    order[first], order[second] = order[second], order[first]
    return order


def _others(axis: int, shape: Sequence[Dim], results: Kinds) -> Iterator[Alignment]:
    """Yield the alignments of axes that an operator leaves as they are."""
    for other, size in enumerate(shape):
        if other != axis and isinstance(size, int):
            yield Alignment({0: Split(other)}, dict.fromkeys(range(len(results)), Split(other)))


def _slice(attrs: Attrs, shape: Sequence[Dim], results: Kinds) -> Iterator[Alignment]:
    axis = _axis(_argument(attrs, 1, "dim", 0), shape)
    yield from _others(axis, shape, results)
    size, start = shape[axis], _argument(attrs, 2, "start", 0) or 0
    end, step = _argument(attrs, 3, "end", _END), _argument(attrs, 4, "step", 1)
    numbers = (size, start, end, step)
    if not all(isinstance(number, int) for number in numbers):
        return
    end = min(end, size)
    if start < 0 or end < 0:
        return
    if end == size and start < step:
        if size % step == 0:
            yield Alignment({0: Split(axis)}, {0: Split(axis)}, unit=step)
    elif step == 1 and end > start and size % (end - start) == start % (end - start) == 0:
        yield Alignment({0: Split(axis, sections=size // (end - start))}, {0: Split(axis)})


def _pieces(attrs: Attrs, shape: Sequence[Dim], results: Kinds) -> Iterator[Alignment]:
    axis = _axis(_argument(attrs, 2, "dim", 0), shape)
    yield from _others(axis, shape, results)
    sizes = {kind.shape[axis] for kind in results if kind is not None}
    if len(sizes) == 1:
        every = dict.fromkeys(range(len(results)), Split(axis))
        yield Alignment({0: Split(axis, sections=len(results))}, every)


def _select(attrs: Attrs, shape: Sequence[Dim], results: Kinds) -> Iterator[Alignment]:
    axis = _axis(_argument(attrs, 1, "dim", 0), shape)
    for alignment in _others(axis, shape, results):
        other = alignment.operands[0].axis
        yield Alignment(alignment.operands, {0: Split(other - (other > axis))})


def _repeated(attrs: Attrs, shape: Sequence[Dim], results: Kinds) -> Iterator[Alignment]:
    axis = _argument(attrs, 2, "dim")
    if axis is None:
        return
    axis = _axis(axis, shape)
    yield from _others(axis, shape, results)
    if shape[axis] == 1:
        yield Alignment({}, {0: Split(axis)})
    else:
        yield Alignment({0: Split(axis)}, {0: Split(axis)})


_CUTS = {
    "slice": _slice, "split_with_sizes": _pieces, "split": _pieces, "chunk": _pieces,
    "select": _select, "repeat_interleave": _repeated,
}  # fmt: skip


def _joined(name: str, attrs: Attrs, operands: Kinds, made: Sequence[Dim]) -> Iterator[Alignment]:
    joined = _axis(_argument(attrs, 1, "dim", 0), made)
    for axis, size in enumerate(made):
        if axis == joined or not isinstance(size, int):
            continue
        own = axis - (name == "stack" and axis > joined)
        yield Alignment(dict.fromkeys(range(len(operands)), Split(own)), {0: Split(axis)})
    sizes = {kind.shape[joined] for kind in operands if kind is not None} if name == "cat" else ()
    if len(sizes) == 1:
        every = dict.fromkeys(range(len(operands)), Split(joined))
        yield Alignment(every, {0: Split(joined, sections=len(operands))})


def _indexed(
    name: str, attrs: Attrs, source: Sequence[Dim], made: Sequence[Dim]
) -> Iterator[Alignment]:
    """Yield the axes behind the ones that are indexed: rows of a matrix that are picked, say."""
    if name == "index_select":
        axis = _axis(_argument(attrs, 1, "dim"), source)
    else:
        indices = _argument(attrs, 1, "indices")
        if len(indices) != 1 or indices[0] is None:
            return
        axis = 0
    for back in range(1, len(source) - axis):
        if isinstance(source[-back], int):
            yield Alignment({0: Split(len(source) - back)}, {0: Split(len(made) - back)})


def _reduced(attrs: Attrs, source: Sequence[Dim], results: Kinds) -> Iterator[Alignment]:
    given = _argument(attrs, 1, "dim")
    axes = [given] if isinstance(given, int) else list(given or range(len(source)))
    reduced = {_axis(axis, source) for axis in axes}
    made = results[0]
    assert made is not None
    kept = len(made.shape) == len(source)
    for axis, size in enumerate(source):
        if axis not in reduced and isinstance(size, int):
            to = axis if kept else axis - sum(other < axis for other in reduced)
            yield Alignment({0: Split(axis)}, dict.fromkeys(range(len(results)), Split(to)))


def _product(operands: Kinds, made: Sequence[Dim]) -> Iterator[Alignment]:
    first, second = operands[:2]
    assert first is not None and second is not None
    a, b = len(first.shape), len(second.shape)
    if a < 2 or b < 2:
        return
    last = len(made) - 1
    yield Alignment({1: Split(b - 1)}, {0: Split(last)})
    yield Alignment({0: Split(a - 1), 1: Split(b - 2)}, sums=(0,))
    yield Alignment({0: Split(a - 2)}, {0: Split(last - 1)})
    for back in range(3, len(made) + 1):
        members = {
            place: Split(len(kind.shape) - back)
            for place, kind in enumerate((first, second))
            if len(kind.shape) >= back and kind.shape[-back] == made[-back]
        }
        if isinstance(made[-back], int):
            yield Alignment(members, {0: Split(len(made) - back)})


_LINEAR = frozenset(
    {"neg", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "slice", "select",
     "split_with_sizes", "split", "chunk", "clone", "contiguous", "alias", "detach"}
)  # fmt: skip
"""Linear in their first operand, and the only one."""


def aten_keeps_sums(op: str, attrs: Attrs, operands: Kinds, summed: Collection[int]) -> bool:
    """Return whether an ATen operator is linear; see `graphopt.ir.splits.keeps_sums`."""
    if op in GROUPED_PRODUCTS:
        return False
    name, places = _name(op), sorted(summed)
    if name in ("add", "sub"):
        scalar = len(operands) < 2
        return not scalar and len(places) == len(operands)
    if name in ("cat", "stack"):
        return len(places) == len(operands)
    if name in ("mul", "div"):
        return places == [0] or (name == "mul" and places == [1])
    if name == "sum" or name in _RESHAPES or name in _LINEAR or name in ("index", "index_select"):
        return places == [0]
    return name == "mean" and places == [0]


def aten_local_attrs(
    op: str, attrs: Attrs, operands: Kinds, results: Kinds, made: Mapping[int, Layout], ranks: int
) -> dict[str, Any]:
    """Return an ATen operator's arguments and types for a rank's parts."""
    types = [
        layout.of_part(kind, ranks)
        if kind is not None and isinstance(layout := made.get(place), Split)
        else kind
        for place, kind in enumerate(results)
    ]
    own = {**attrs, "types": types}
    layout = made.get(0)
    if not isinstance(layout, Split) or op in GROUPED_PRODUCTS:
        return own
    args, name, parts, axis = list(attrs["args"]), _name(op), layout.parts(ranks), layout.axis
    source = operands[0] if operands else None
    if name in ("reshape", "view", "_unsafe_view", "expand", *_FILLED):
        args[1] = _smaller(args[1], axis, parts, results[0])
    elif name == "unflatten":
        first = _axis(args[1], source.shape)  # type: ignore[union-attr]
        args[2] = _smaller(args[2], axis - first, parts, None)
    elif source is None:
        return own
    elif name == "repeat_interleave" and source.shape[axis] == 1:
        args[1] //= parts
    elif (
        name in ("split_with_sizes", "split")
        and _axis(_argument(attrs, 2, "dim", 0), source.shape) == axis
    ):
        args[1] = [n // parts for n in args[1]] if isinstance(args[1], list) else args[1] // parts
    elif name == "slice" and _axis(_argument(attrs, 1, "dim", 0), source.shape) == axis:
        if _argument(attrs, 4, "step", 1) == 1:
            args[2:4] = [n // parts if isinstance(n, int) and n < _END else n for n in args[2:4]]
    return {**own, "args": args}


def _smaller(sizes: Sequence[Dim], axis: int, parts: int, made: Any) -> list[Dim]:
    """Return sizes that an operator is given, those of the split axis for a part."""
    given = list(sizes)
    place = axis if made is None else axis - len(made.shape) + len(given)
    size = given[place] if 0 <= place < len(given) else -1
    if isinstance(size, int) and size > 1:
        given[place] = size // parts
    return given
