"""Activations rounded to few bits in an ONNX graph: as values, or as integers with their scale.

What they are is decided by what reads them: a product with packed weights takes the integers, and
all else takes the values. Either is a call of a local function, one for every way to round, whose
body repeats the formula of `graphopt.ir.functional.quantise_dequantise` operation by operation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.lowering.onnx.builder import GRAPHOPT, OPSET, GraphBuilder


@dataclass(eq=False)
class Rounded:
    """A tensor rounded along its last axis.

    Attributes:
        x: The tensor, fp32.
        clips: What part of the range below 0 and above 0 codes cover; None for all of it.
        bits: Width of a code.
        symmetric: Whether there is no zero point.
    """

    x: ir.Value
    clips: tuple[ir.Value | None, ir.Value | None]
    bits: int
    symmetric: bool
    _values: ir.Value | None = None
    _integers: list[ir.Value] = field(default_factory=list)

    def whole(self, builder: GraphBuilder) -> ir.Value:
        """Return the values that codes stand for, fp32."""
        if self._values is None:
            self._values = self._call(builder, integers=False)
        return self._values

    def integers(self, builder: GraphBuilder) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return codes, uint8, their zero point, a uint8 scalar, and their scales [..., 1], fp32.

        Raises:
            ValueError: Tokens have zero points of their own.
        """
        if not self.symmetric:
            raise ValueError("integers of tokens with zero points of their own have no product")
        if not self._integers:
            self._integers = self._call(builder, integers=True, outputs=2)
        codes, scales = self._integers
        return codes, builder.constant(2 ** (self.bits - 1), np.uint8), scales

    def _call(self, builder: GraphBuilder, *, integers: bool, outputs: int = 1) -> Any:
        which = [
            name for name, clip in zip(("Low", "High"), self.clips, strict=True) if clip is not None
        ]
        name = "".join(
            [
                "Quantise" if integers else "QuantiseDequantise",
                str(self.bits),
                "" if self.symmetric else "Asymmetric",
                *(f"Clip{clip}" for clip in which),
            ]
        )
        function = builder.functions.get(name) or _function(
            name, self.bits, self.symmetric, which, integers
        )
        given = [self.x, *(clip for clip in self.clips if clip is not None)]
        return builder.call(function, *given, outputs=outputs)


class _Body:
    """The nodes of a function's body, in fp32."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def number(self, value: float) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.float32(value)))


def _function(
    name: str, bits: int, symmetric: bool, clips: list[str], integers: bool
) -> ir.Function:
    """Return a rounding of the last axis as a function of x and of the clips that there are."""
    body = _Body()
    x, given = ir.Value(name="x"), {clip: ir.Value(name=f"clip_{clip.lower()}") for clip in clips}
    axis = body.op("Constant", value=ir.tensor(np.array([-1], np.int64)))
    nought = body.number(0.0)
    if symmetric and not clips:
        low, high = None, body.op("ReduceMax", body.op("Abs", x), axis, keepdims=1)
    else:
        low = body.op("Min", body.op("ReduceMin", x, axis, keepdims=1), nought)
        high = body.op("Max", body.op("ReduceMax", x, axis, keepdims=1), nought)
        low = body.op("Mul", low, given["Low"]) if "Low" in given else low
        high = body.op("Mul", high, given["High"]) if "High" in given else high
    if symmetric:
        first, last = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        reach = high if low is None else body.op("Max", high, body.op("Neg", low))
        scale = body.op("Div", reach, body.number(last))
    else:
        assert low is not None
        first, last = 0, 2**bits - 1
        scale = body.op("Div", body.op("Sub", high, low), body.number(last))
    scale = body.op("Where", body.op("Equal", scale, nought), body.number(1.0), scale)
    codes = body.op("Round", body.op("Div", x, scale))
    if symmetric:
        values = body.op("Clip", codes, body.number(first), body.number(last))
    else:
        assert low is not None
        zero = body.op("Round", body.op("Div", body.op("Neg", low), scale))
        limits = body.number(first), body.number(last)
        values = body.op("Sub", body.op("Clip", body.op("Add", codes, zero), *limits), zero)
    if integers:
        moved = body.op("Add", values, body.number(-first))
        results = [body.op("Cast", moved, to=ir.DataType.UINT8), scale]
    else:
        results = [body.op("Mul", values, scale)]
    graph = ir.Graph(
        [x, *given.values()], results, nodes=body.nodes, opset_imports={"": OPSET}, name=name
    )
    return ir.Function(GRAPHOPT, name, graph=graph, attributes=[])
