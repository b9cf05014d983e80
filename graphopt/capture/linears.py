"""Raising matrix products with a weight to `linear`, weight as [out, in]."""

from __future__ import annotations

import contextlib

from graphopt.capture.rewriting import NotRaisedError, Raiser, base
from graphopt.capture.slots import SlotSources
from graphopt.ir.graph import In, Node, Value
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.elementwise import Unary

_TRANSPOSES = ("numpy_T", "t", "mT", "T", "transpose", "permute", "adjoint")


def raise_linears(raiser: Raiser, slots: SlotSources) -> None:
    """Raise matmul, mm and addmm with a weight, and take in a bias added afterwards."""
    for node in list(raiser.function.nodes):
        with contextlib.suppress(NotRaisedError):
            _raise_product(raiser, slots, node)
    _merge_bias(raiser)
    raiser.sweep()


def _raise_product(raiser: Raiser, slots: SlotSources, node: Node) -> None:
    name = base(node.op)
    if name in ("matmul", "mm") and "." in node.op:
        x, weight = raiser.arg(node, 0), raiser.arg(node, 1)
        _raise(raiser, slots, node, x, weight, None)
    elif name == "addmm" and raiser.arg(node, 3, "beta", 1) == raiser.arg(node, 4, "alpha", 1):
        bias = raiser.arg(node, 0)
        if raiser.is_weight(bias) and len(raiser.types[bias].shape) == 1:
            _raise(raiser, slots, node, raiser.arg(node, 1), raiser.arg(node, 2), bias)


def _raise(
    raiser: Raiser, slots: SlotSources, node: Node, x: Value, weight: Value, bias: Value | None
) -> None:
    turned = raiser.made_by(weight, *_TRANSPOSES)
    if turned is not None:
        inner = raiser.arg(turned, 0)
        if raiser.is_weight(inner) and len(raiser.types[inner].shape) == 2:
            raiser.replace(node.output, "linear", [x, inner, bias])
        return
    if raiser.is_weight(weight) and len(raiser.types[weight].shape) == 2:
        transposed = slots.transposed(raiser, weight)
        raiser.replace(node.output, "linear", [x, transposed, bias])


def _merge_bias(raiser: Raiser) -> None:
    """linear(x, w) + b with a bias weight becomes linear(x, w, b)."""
    for node in list(raiser.function.nodes):
        if node.op != "add" or None in node.inputs:
            continue
        for product, bias in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            assert product is not None and bias is not None
            made = raiser.made_by(product, "linear")
            if made is None or made.op != "linear" or len(made.inputs) > 2:
                continue
            width = raiser.types[product].shape[-1:]
            only = len(raiser.function.uses()[product]) == 1
            if only and raiser.is_weight(bias) and raiser.types[bias].shape == width:
                raiser.replace(node.output, "linear", [*made.inputs, bias])
                break


def sink_reshape_below_linear(raiser: Raiser) -> None:
    """Move reshapes [B, S, N] -> [B*S, N] behind everything that works feature by feature.

    They then meet the reshape back and vanish.
    """
    for node in list(raiser.function.nodes):
        if not _per_token(raiser, node) or len(node.outputs) != 1:
            continue
        streams = [v for v in node.inputs if v is not None and raiser.slot(v) is None]
        roots = [_unflattened(raiser, v) for v in streams]
        shapes = {raiser.types[r].shape for r in roots if r is not None}
        if not streams or None in roots or len(shapes) != 1:
            continue
        swap = dict(zip(streams, roots, strict=True))
        operands = [swap.get(v, v) if v is not None else None for v in node.inputs]
        with contextlib.suppress(NotRaisedError):
            wide = raiser.insert(node.op, operands, dict(node.attrs), node)
            old = node.output
            kind = raiser.types[old]
            attrs = {"args": [In(0), list(kind.shape)], "kwargs": {}, "types": [kind]}
            flat = raiser.function.add(
                "aten.reshape.default", [wide.output], attrs, ["flat"], before=node
            )
            raiser.types[flat.output] = kind
            raiser.function.replace(old, flat.output)
    raiser.sweep()


def _per_token(raiser: Raiser, node: Node) -> bool:
    if is_aten(node.op):
        return False
    return node.op in ("linear", "rms_norm", "layer_norm", "add", "mul") or isinstance(
        get_op(node.op), Unary
    )


def _unflattened(raiser: Raiser, value: Value) -> Value | None:
    """Return x [B, S, N] where `value` is x as [B*S, N]."""
    flat = raiser.made_by(value, "reshape", "flatten")
    root = raiser.arg(flat, 0) if flat is not None else None
    if not isinstance(root, Value):
        return None
    before, after = raiser.types[root].shape, raiser.types[value].shape
    if len(before) <= len(after) or len(after) < 2 or before[-1] != after[-1]:
        return None
    return root
