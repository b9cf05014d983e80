"""Embeddings and matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.ir.graph import Node
from graphopt.lowering.onnx.builder import GRAPHOPT, MICROSOFT, OPSET, GraphBuilder
from graphopt.lowering.onnx.ops.registry import Heads, Lowered, Lowering, translation
from graphopt.lowering.onnx.quantised import QuantisedMatrix
from graphopt.lowering.onnx.rounded import Rounded


@translation("embedding")
def embedding(lower: Lowering, node: Node) -> ir.Value:
    ids, weight = lower.whole(node.inputs[0]), node.inputs[1]
    offset = lower.attrs(node).get("offset", 0)
    if offset:
        ids = lower.builder.op("Add", ids, lower.builder.constant(offset))
    assert weight is not None
    stored = lower.values[weight]
    if isinstance(stored, QuantisedMatrix) and stored.gather_block is not None:
        return stored.gather(lower.builder, ids)
    return lower.builder.op("Gather", lower.whole(weight), ids, axis=0)


@translation("linear")
def linear(lower: Lowering, node: Node) -> ir.Value:
    """MatMul with a weight stored as [in, out], which is what ONNX Runtime packs best.

    A packed one is read by MatMulNBits where that knows its blocks, else by DequantizeLinear; with
    inputs that are rounded, and a scale for each output, it is a product of integers.

    A weight that is stored as [out, in] for another use, such as a tied embedding or another
    form of the model, is not stored twice: it is read transposed.
    """
    builder = lower.builder
    x, weight = node.inputs[0], node.inputs[1]
    assert x is not None and weight is not None
    if node in lower.packs:
        return _packed(lower, node, lower.whole(x))
    bias = node.operand(2)
    given, stored = lower.values[x], lower.values[weight]
    rounded = isinstance(given, Rounded)
    if not isinstance(stored, QuantisedMatrix):
        product = _product(lower, lower.whole(x), lower.whole(weight))
    elif isinstance(given, Rounded) and given.symmetric and stored.in_integers:
        product = stored.integer_matmul(builder, *given.integers(builder))
    elif stored.in_blocks:
        product = stored.matmul(builder, lower.whole(x), exact=rounded)
    else:
        product = _product(lower, lower.whole(x), lower.whole(weight))
    return product if bias is None else builder.op("Add", product, lower.whole(bias))


def _product(lower: Lowering, x: ir.Value, matrix: ir.Value) -> ir.Value:
    """Return x W for a matrix that is stored as [in, out], and x W^T for one as [out, in]."""
    if matrix in lower.shared["transposed"]:
        product: ir.Value = lower.builder.op("MatMul", x, matrix)
    else:
        product = lower.builder.op("FusedMatMul", x, matrix, domain=MICROSOFT, transB=1)
    return product


def _packed(lower: Lowering, node: Node, x: ir.Value) -> ir.Value:
    """Return this linear's part of a product that its siblings share."""
    builder, pack = lower.builder, lower.packs[node]
    key = ("pack", pack)
    if key not in lower.shared:
        widths = [int(lower.types[member.inputs[1]].shape[0]) for member in pack.nodes]  # type: ignore[index]
        product = _product(lower, x, pack.matrix)
        parts = builder.op("Split", product, builder.constant(widths), outputs=len(widths), axis=-1)
        lower.shared[key] = dict(zip(pack.nodes, parts, strict=True))
    part = lower.shared[key][node]
    bias = node.operand(2)
    return part if bias is None else builder.op("Add", part, lower.whole(bias))


@translation("kronecker")
def kronecker(lower: Lowering, node: Node) -> Lowered:
    """A local function of standard ops, which a runtime with a kernel of that name may replace.

    Heads stay flat: the features of each are a row of the same matrix.
    """
    builder = lower.builder
    x, left, right = node.inputs[0], node.operand(1), node.operand(2)
    assert x is not None
    if right is not None and left is None:
        factor, lowered = lower.whole(right), lower.values[x]
        if isinstance(lowered, Heads):
            flat = builder.call(_kronecker_function(builder, False, True), lowered.flat, factor)
            return Heads(flat, lowered.heads, lowered.dim, lowered.heads_first)
        if lower.types[right].shape[0] == lower.types[x].shape[-1]:
            return builder.op("MatMul", lower.whole(x), factor)  # type: ignore[no-any-return]
    factors = [lower.whole(value) for value in (left, right) if value is not None]
    function = _kronecker_function(builder, left is not None, right is not None)
    return builder.call(function, lower.whole(x), *factors)  # type: ignore[no-any-return]


def _kronecker_function(builder: GraphBuilder, left: bool, right: bool) -> ir.Function:
    """Return `graphopt::KroneckerTransform`, or that with one factor alone.

    Sizes are those of the factors, so that one function does for all.
    """
    name = "KroneckerTransform" + ("" if left and right else "Left" if left else "Right")
    if name in builder.functions:
        return builder.functions[name]
    x, first, second = (ir.Value(name=what) for what in ("x", "left", "right"))
    nodes: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes))
        return nodes[-1].outputs[0]

    def size(factor: ir.Value, given: bool) -> ir.Value:
        rest = np.array([-1], dtype=np.int64)
        return op("Shape", factor, end=1) if given else op("Constant", value=ir.tensor(rest))

    sizes = op("Shape", x, end=-1), size(first, left), size(second, right)
    rows = op("Reshape", x, op("Concat", *sizes, axis=0))
    if right:
        rows = op("MatMul", rows, second)
    if left:
        rows = op("MatMul", op("Transpose", first, perm=[1, 0]), rows)
    op("Reshape", rows, op("Shape", x))
    inputs = [x, *([first] if left else []), *([second] if right else [])]
    imports = {"": OPSET}
    graph = ir.Graph(inputs, [nodes[-1].outputs[0]], nodes=nodes, opset_imports=imports, name=name)
    return ir.Function(GRAPHOPT, name, graph=graph, attributes=[])
