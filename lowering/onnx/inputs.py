"""What a graph takes: which inputs, the sizes that are read off them, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import sympy

from graphopt.ir.graph import Program
from graphopt.ir.sighted import EMBEDS, PICTURES
from graphopt.ir.types import B, P, S, Type
from graphopt.lowering.onnx.builder import GraphBuilder


def taken(program: Program) -> list[str]:
    """Return the inputs of a program's graph.

    One that takes embeddings takes token ids where they say which tokens are of pictures, and
    nothing else that it does not read. All others take all of their inputs.
    """
    inputs = list(program.inputs)
    if EMBEDS not in inputs:
        return inputs
    read = {name for call in program.calls for name in call.args}
    if program.states:
        read.add("attention_mask")
    if PICTURES in read:
        read.add("input_ids")
    return [name for name in inputs if name in read and name != PICTURES]


def bind_sizes(
    builder: GraphBuilder, types: Mapping[str, Type], values: Mapping[str, ir.Value], cached: bool
) -> None:
    """Say where a graph reads the sizes B, S and P.

    Args:
        types: Of the inputs, in the order in which they are looked through.
        cached: There are pasts, over which and the new tokens `attention_mask` goes.
    """
    for symbol in (B, S):
        for name, value in values.items():
            if _read_off(builder, symbol, types[name], value):
                break
    total = builder.bound(S)
    if cached:
        length, mask = total, values["attention_mask"]
        assert length is not None
        total = builder.op("Shape", mask, start=1, end=2, name="sizes/T")
        builder.bind(P, builder.op("Sub", total, length, name="sizes/P"))
    elif total is not None:
        builder.bind(P, builder.constant([0]))
    if total is not None:
        builder.bind(P + S, total)


def _read_off(builder: GraphBuilder, symbol: sympy.Symbol, kind: Type, value: ir.Value) -> bool:
    """Bind a symbol where a dimension of an input is so many times it."""
    for axis, size in enumerate(kind.shape):
        if isinstance(size, int) or size.free_symbols != {symbol}:
            continue
        times = size / symbol
        if not times.is_Integer:
            continue
        name = f"sizes/{symbol}"
        if times == 1:
            read = builder.op("Shape", value, start=axis, end=axis + 1, name=name)
        else:
            whole = builder.op("Shape", value, start=axis, end=axis + 1)
            read = builder.op("Div", whole, builder.constant([int(times)]), name=name)
        builder.bind(symbol, read)
        return True
    return False


def picture_numbers(
    builder: GraphBuilder, ids: ir.Value, token: int, batch: ir.Value, past: ir.Value
) -> ir.Value:
    """Return which picture each token belongs to, int64 [batch, past + new], -1 for none.

    A picture is a run of image tokens, all of which are among the new ones: those of the past are
    of none, and nobody looks behind itself at them.
    """
    one, zero = builder.constant([1]), builder.constant([0])
    own = builder.op(
        "Cast", builder.op("Equal", ids, builder.constant(token)), to=ir.DataType.INT64
    )
    pads = builder.constant([0, 1, 0, 0])
    before = builder.op("Slice", builder.op("Pad", own, pads), zero, builder.constant([-1]), one)
    begins = builder.op("Mul", own, builder.op("Sub", one, before))
    counted = builder.op("CumSum", begins, builder.constant(1))
    numbers = builder.op("Sub", builder.op("Mul", own, counted), one)
    shape = builder.op("Concat", batch, past, axis=0)
    none = builder.op("Expand", builder.constant([-1]), shape)
    made: ir.Value = builder.op("Concat", none, numbers, axis=1)
    return made
