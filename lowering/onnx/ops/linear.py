"""Embeddings and matrix products."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.graph import Node
from graphopt.lowering.onnx.builder import MICROSOFT
from graphopt.lowering.onnx.ops.registry import Lowering, translation
from graphopt.lowering.onnx.quantised import QuantisedMatrix


@translation("embedding")
def embedding(lower: Lowering, node: Node) -> ir.Value:
    ids, weight = lower.whole(node.inputs[0]), node.inputs[1]
    offset = lower.attrs(node).get("offset", 0)
    if offset:
        ids = lower.builder.op("Add", ids, lower.builder.constant(offset))
    assert weight is not None
    stored = lower.values[weight]
    if isinstance(stored, QuantisedMatrix) and stored.in_blocks:
        return stored.gather(lower.builder, ids)
    return lower.builder.op("Gather", lower.whole(weight), ids, axis=0)


@translation("linear")
def linear(lower: Lowering, node: Node) -> ir.Value:
    """MatMul with a weight stored as [in, out], which is what ONNX Runtime packs best.

    A packed one is read by MatMulNBits where that knows its blocks, else by DequantizeLinear.

    A weight that is stored as [out, in] for another use, such as a tied embedding or another
    form of the model, is not stored twice: it is read transposed.
    """
    builder = lower.builder
    x, weight = lower.whole(node.inputs[0]), node.inputs[1]
    assert weight is not None
    if node in lower.packs:
        return _packed(lower, node, x)
    bias = node.operand(2)
    stored = lower.values[weight]
    if isinstance(stored, QuantisedMatrix) and stored.in_blocks:
        product = stored.matmul(builder, x)
        return product if bias is None else builder.op("Add", product, lower.whole(bias))
    product = _product(lower, x, lower.whole(weight))
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
