"""ATen operators of towers: convolutions, pooling, patches, and attention without a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import sympy
import torch

from graphopt.ir.graph import Node
from graphopt.ir.types import dim
from graphopt.lowering.onnx.builder import MICROSOFT
from graphopt.lowering.onnx.ops.registry import Lowered, Lowering, translation


def _sizes(given: Any, count: int) -> list[int]:
    """Return an argument of so many numbers, which may be given as one for all."""
    values = list(given) if isinstance(given, list | tuple) else [given]
    return [int(value) for value in (values * count if len(values) == 1 else values)]


@translation("aten.conv1d", "aten.conv2d", "aten.conv3d")
def convolution(lower: Lowering, node: Node) -> ir.Value:
    x, weight = lower.whole(lower.aten_arg(node, 0)), lower.whole(lower.aten_arg(node, 1))
    bias, padding = lower.aten_arg(node, 2, "bias"), lower.aten_arg(node, 4, "padding", 0)
    count = int(node.op[len("aten.conv")])
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):
        raise ValueError(f"conv{count}d with padding {padding!r} has no ONNX form here")
    return lower.builder.op(
        "Conv", x, weight, None if bias is None else lower.whole(bias),
        strides=_sizes(lower.aten_arg(node, 3, "stride", 1), count),
        pads=_sizes(padding, count) * 2,
        dilations=_sizes(lower.aten_arg(node, 5, "dilation", 1), count),
        group=lower.aten_arg(node, 6, "groups", 1),
    )  # fmt: skip


@translation("aten.avg_pool2d")
def average_pool(lower: Lowering, node: Node) -> ir.Value:
    kernel = _sizes(lower.aten_arg(node, 1), 2)
    if lower.aten_arg(node, 6, "divisor_override") is not None:
        raise ValueError("avg_pool2d with a divisor of its own has no ONNX form here")
    return lower.builder.op(
        "AveragePool", lower.whole(lower.aten_arg(node, 0)),
        kernel_shape=kernel,
        strides=_sizes(lower.aten_arg(node, 2, "stride", []) or kernel, 2),
        pads=_sizes(lower.aten_arg(node, 3, "padding", 0), 2) * 2,
        ceil_mode=int(lower.aten_arg(node, 4, "ceil_mode", False)),
        count_include_pad=int(lower.aten_arg(node, 5, "count_include_pad", True)),
    )  # fmt: skip


@translation("aten.im2col")
def patches(lower: Lowering, node: Node) -> ir.Value:
    """[N, C, H, W] cut into patches, side by side: [N, C * tall * wide, patches]."""
    builder, x = lower.builder, lower.aten_arg(node, 0)
    tall, wide = _sizes(lower.aten_arg(node, 1), 2)
    dilation = _sizes(lower.aten_arg(node, 2, "dilation", 1), 2)
    padding = _sizes(lower.aten_arg(node, 3, "padding", 0), 2)
    stride = _sizes(lower.aten_arg(node, 4, "stride", 1), 2)
    if (dilation, padding, stride) != ([1, 1], [0, 0], [tall, wide]):
        raise ValueError("im2col of patches that overlap or are padded has no ONNX form here")
    batch, channels, height, width = lower.types[x].shape
    down, across = dim(sympy.sympify(height) / tall), dim(sympy.sympify(width) / wide)
    cut = builder.reshape(lower.whole(x), [batch, channels, down, tall, across, wide])
    turned = builder.op("Transpose", cut, perm=[0, 1, 3, 5, 2, 4])
    return builder.reshape(turned, lower.types[node.output].shape)


@translation("aten.meshgrid")
def meshgrid(lower: Lowering, node: Node) -> Sequence[Lowered]:
    builder, made = lower.builder, []
    count = len(node.outputs)
    shape = builder.shape(lower.types[node.outputs[0]].shape)
    order = list(range(count))
    if lower.aten_arg(node, 1, "indexing", "ij") == "xy":
        order[:2] = order[1::-1]
    for axis, leaf in zip(order, node.attrs["args"][0], strict=True):
        along = builder.constant([-1 if place == axis else 1 for place in range(count)])
        line = builder.op("Reshape", lower.whole(node.inputs[leaf.index]), along)
        made.append(builder.op("Expand", line, shape))
    return made


@translation("aten.scaled_dot_product_attention")
def attention(lower: Lowering, node: Node) -> ir.Value:
    """[B, H, S, D] of every query; without a mask by the kernel that keeps no scores."""
    builder = lower.builder
    query, key, value = (lower.aten_arg(node, place) for place in range(3))
    mask = lower.aten_arg(node, 3, "attn_mask")
    _, heads, _, width = lower.types[query].shape
    odd = lower.aten_arg(node, 5, "is_causal", False) or lower.aten_arg(
        node, 7, "enable_gqa", False
    )
    if odd or len(lower.types[query].shape) != 4:
        raise ValueError("attention that is causal or has fewer keys' heads has no ONNX form here")
    scale = lower.aten_arg(node, 6, "scale")
    scale = 1 / math.sqrt(int(width)) if scale is None else float(scale)
    q, k, v = (lower.whole(operand) for operand in (query, key, value))
    if mask is None:
        flat = []
        for operand in (q, k, v):
            turned = builder.op("Transpose", operand, perm=[0, 2, 1, 3])
            flat.append(builder.op("Reshape", turned, builder.constant([0, 0, -1])))
        mixed = builder.op(
            "MultiHeadAttention", *flat, domain=MICROSOFT, num_heads=int(heads), scale=scale
        )
        split = builder.op("Reshape", mixed, builder.constant([0, 0, int(heads), -1]))
        return builder.op("Transpose", split, perm=[0, 2, 1, 3])
    turned = builder.op("Transpose", k, perm=[0, 1, 3, 2])
    scores = builder.op("MatMul", builder.op("Mul", q, builder.number(scale)), turned)
    bias = lower.whole(mask)
    if lower.types[mask].dtype == torch.bool:
        seen, hidden = builder.number(0.0), builder.number(float("-inf"))
        bias = builder.op("Where", bias, seen, hidden)
    shares = builder.op("Softmax", builder.op("Add", scores, bias), axis=-1)
    return builder.op("MatMul", shares, v)


@translation("aten.bucketize")
def bucketize(lower: Lowering, node: Node) -> ir.Value:
    """How many boundaries lie below a value, or at it as well."""
    builder, x = lower.builder, lower.aten_arg(node, 0)
    last = builder.constant([len(lower.types[x].shape)])
    value = builder.op("Unsqueeze", lower.whole(x), last)
    compare = "GreaterOrEqual" if lower.aten_arg(node, 3, "right", False) else "Greater"
    passed = builder.op(compare, value, lower.whole(lower.aten_arg(node, 1)))
    kind = ir.DataType.INT32 if lower.aten_arg(node, 2, "out_int32", False) else ir.DataType.INT64
    counted = builder.op("Cast", passed, to=kind)
    return builder.op("ReduceSum", counted, builder.constant([-1]), keepdims=0)
