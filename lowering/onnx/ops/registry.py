"""The registry of translations into ONNX, and what a translation is given to work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from graphopt.ir.graph import Call, Function, Node, Program, Value, resolve_attrs
from graphopt.ir.ops.aten import aten_argument
from graphopt.ir.types import Type
from graphopt.lowering.onnx.builder import GraphBuilder
from graphopt.lowering.onnx.moe import Fused
from graphopt.lowering.onnx.quantised import QuantisedMatrix
from graphopt.lowering.onnx.rounded import Rounded


@dataclass
class Heads:
    """A tensor of heads, kept flat [B, S, heads * dim] for as long as possible.

    The fused ONNX ops take and give flat tensors; [B, H, S, D] is made when something asks.

    Attributes:
        flat: [B, S, heads * dim].
        heads_first: The IR value is [B, H, S, D] rather than [B, S, H, D].
    """

    flat: ir.Value
    heads: int
    dim: int
    heads_first: bool
    _whole: ir.Value | None = None

    def whole(self, builder: GraphBuilder) -> ir.Value:
        """Return the four-dimensional tensor."""
        if self._whole is None:
            split = builder.op("Reshape", self.flat, builder.constant([0, 0, self.heads, self.dim]))
            if self.heads_first:
                split = builder.op("Transpose", split, perm=[0, 2, 1, 3])
            self._whole = split
        return self._whole


@dataclass
class Sum:
    """A sum of two streams [B, S, N] that is not made yet: a norm behind it may take it in.

    Whatever reads it first decides. It may be read in the call after the one that adds.
    """

    a: ir.Value
    b: ir.Value
    total: ir.Value | None = None

    def whole(self, builder: GraphBuilder) -> ir.Value:
        """Return the sum."""
        if self.total is None:
            self.total = builder.op("Add", self.a, self.b)
        return self.total


Lowered = ir.Value | Heads | Sum | QuantisedMatrix | Rounded


@dataclass(eq=False)
class Pack:
    """Linears of one input, computed by one product.

    Attributes:
        nodes: The linears, in order.
        matrix: Their weights side by side, [in, sum of outs] where it is among the transposed,
            else [sum of outs, in].
    """

    nodes: tuple[Node, ...]
    matrix: ir.Value


@dataclass
class Lowering:
    """Lowers the nodes of one call after the other.

    Attributes:
        builder: The graph being written.
        program, call, function: What is being lowered.
        types: Types of the call's values.
        values: What each value of the function has become.
        positions: The graph's `position_ids`, `attention_mask`, `input_ids`.
        shared: Things made once for the whole graph, such as masks, by key.
        packs: For a linear whose weight is stored with those of its siblings, the pack.
        fused: For `experts` that com.microsoft::MoE computes, the weights in its layout.
    """

    builder: GraphBuilder
    program: Program
    call: Call
    function: Function
    types: Mapping[Value, Type]
    values: dict[Value, Lowered]
    inputs: Mapping[str, ir.Value]
    shared: dict[Any, Any] = field(default_factory=dict)
    packs: Mapping[Node, Pack] = field(default_factory=dict)
    fused: Mapping[Node, Fused] = field(default_factory=dict)

    def attrs(self, node: Node) -> dict[str, Any]:
        return resolve_attrs(node, self.call)

    def whole(self, value: Value | None) -> ir.Value:
        """Return a value as a plain ONNX tensor of the IR's shape."""
        assert value is not None
        lowered = self.values[value]
        return lowered if isinstance(lowered, ir.Value) else lowered.whole(self.builder)

    def heads(self, value: Value | None) -> Heads:
        """Return a four-dimensional value as flat heads, [B, H, S, D] in the IR."""
        assert value is not None
        lowered = self.values[value]
        if isinstance(lowered, Heads):
            return lowered
        _, heads, _, width = self.types[value].shape
        lowered = self.whole(value)
        turned = self.builder.op("Transpose", lowered, perm=[0, 2, 1, 3])
        flat = self.builder.op(
            "Reshape", turned, self.builder.constant([0, 0, int(heads) * int(width)])
        )
        return Heads(flat, int(heads), int(width), True, lowered)

    aten_arg = staticmethod(aten_argument)


Translation = Callable[[Lowering, Node], Lowered | Sequence[Lowered]]
_TRANSLATIONS: dict[str, Translation] = {}


def translation(*names: str) -> Callable[[Translation], Translation]:
    """Decorator: the translation into ONNX of an op, or of every overload of an ATen operator."""

    def add(translated: Translation) -> Translation:
        for name in names:
            if name in _TRANSLATIONS:
                raise ValueError(f"{name!r} has a translation already")
            _TRANSLATIONS[name] = translated
        return translated

    return add


def translation_of(op: str) -> Translation | None:
    """Return the translation of an op; an ATen operator is looked up with and without overload."""
    if op in _TRANSLATIONS:
        return _TRANSLATIONS[op]
    if "." in op:
        namespace, name, _ = op.split(".")
        return _TRANSLATIONS.get(f"{namespace}.{name}")
    return None
