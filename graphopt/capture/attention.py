"""Raising attention: torch's SDPA, and products around a softmax written out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt.capture.rewriting import NotRaisedError, Raiser, base
from graphopt.ir.graph import In, Node, Value
from graphopt.ir.types import Type, dim

PRODUCTS = ("matmul", "bmm", "baddbmm")
_NOT_ATTENTION = "no product with values follows the softmax"


@dataclass
class Term:
    """Something added to the scores, or a choice of keys.

    Attributes:
        value: The tensor, broadcastable to [B, H, S, T] or [B*H, S, T].
        kind: `add` for a number added, `allow` for a bool that is true where a key is seen,
            `block` for one that is true where it is not.
    """

    value: Value
    kind: str


@dataclass
class Raised:
    """An attention node whose score terms are still to be recognised."""

    node: Node
    terms: list[Term] = field(default_factory=list)


@dataclass
class _Scores:
    """What stands between the product of q and k and the softmax."""

    q: Value
    k: Value
    scale: float
    softcap: float | None
    terms: list[Term]
    sinks: Value | None


def raise_attention(raiser: Raiser) -> tuple[list[Raised], list[tuple[str, str]]]:
    """Raise every attention of the function.

    Returns:
        The raised nodes, and (node name, reason) for softmaxes left as they are.
    """
    raised: list[Raised] = []
    left: list[tuple[str, str]] = []
    for node in list(raiser.function.nodes):
        name = base(node.op)
        try:
            if name == "scaled_dot_product_attention":
                raised.append(_raise_sdpa(raiser, node))
            elif name in ("softmax", "_softmax"):
                reason = _raise_eager(raiser, node, raised)
                if reason is not None and reason != _NOT_ATTENTION:
                    left.append((node.output.name, reason))
        except NotRaisedError as error:
            left.append((node.output.name, str(error)))
    # The caller sweeps, once it holds on to the terms, which no node reads for now.
    return raised, left


def _strip(raiser: Raiser, value: Value, factor: float = 1.0) -> tuple[Value, float]:
    """Take repeated heads and plain factors off an operand."""
    while True:
        repeat = raiser.made_by(value, "repeat_interleave")
        scaled = raiser.made_by(value, "scale")
        if repeat is not None and repeat.attrs["args"][2] == 1:
            inner = repeat.inputs[0]
        elif scaled is not None:
            factor *= scaled.attrs["factor"]
            inner = scaled.inputs[0]
        else:
            return value, factor
        assert inner is not None
        value = inner


def _strip_keys(raiser: Raiser, k: Value, v: Value, factor: float) -> tuple[Value, Value, float]:
    """Strip keys and values alike: both of repeated heads or neither."""
    bare_k, bare_factor = _strip(raiser, k, factor)
    bare_v = _strip_repeat(raiser, v)
    heads_k, heads_v = (raiser.types[x].shape[1] for x in (bare_k, bare_v))
    return (bare_k, bare_v, bare_factor) if heads_k == heads_v else (k, v, factor)


def _strip_repeat(raiser: Raiser, value: Value) -> Value:
    repeat = raiser.made_by(value, "repeat_interleave")
    if repeat is not None and repeat.attrs["args"][2] == 1 and repeat.inputs[0] is not None:
        return repeat.inputs[0]
    return value


def _raise_sdpa(raiser: Raiser, node: Node) -> Raised:
    q, k, v = (raiser.arg(node, i) for i in range(3))
    scale = raiser.arg(node, 6, "scale")
    width = int(raiser.types[q].shape[-1])
    factor = float(scale) if scale is not None else 1 / math.sqrt(width)
    q, factor = _strip(raiser, q, factor)
    k, v, factor = _strip_keys(raiser, k, v, factor)
    mask = raiser.arg(node, 3, "attn_mask")
    causal = bool(raiser.arg(node, 5, "is_causal", False))
    attrs = _attrs(factor, causal, None)
    made = raiser.insert("attention", [q, k, v], attrs, node, ["a"])
    raiser.function.replace(node.output, made.output)
    terms: list[Term] = []
    if mask is not None:
        terms = [Term(mask, "allow" if raiser.types[mask].dtype == torch.bool else "add")]
    return Raised(made, terms)


def _attrs(scale: float, causal: bool, softcap: float | None) -> dict[str, Any]:
    return {
        "scale": scale,
        "causal": causal,
        "window": None,
        "chunk": None,
        "softcap": softcap,
    }


def _raise_eager(raiser: Raiser, softmax: Node, raised: list[Raised]) -> str | None:
    """Raise the attention around a softmax; return why not, or None when done."""
    weights, dropped = _weights_after(raiser, softmax)
    product, v = _value_product(raiser, weights)
    if product is None or v is None:
        return _NOT_ATTENTION
    rank = len(raiser.types[softmax.output].shape)
    if raiser.arg(softmax, 1, "dim") not in (-1, rank - 1):
        return "its softmax is not over the keys"
    scores = _scores_before(raiser, raiser.arg(softmax, 0), dropped)
    if isinstance(scores, str):
        return scores
    q, factor = _strip(raiser, scores.q, scores.scale)
    k, v, factor = _strip_keys(raiser, scores.k, v, factor)
    q, k, v = (_as_heads(raiser, x, product) for x in (q, k, v))  # type: ignore[assignment]
    if q is None or k is None or v is None:
        return "its operands are not [B, heads, S, head_dim]"
    q, factor = _strip(raiser, q, factor)
    k, v, factor = _strip_keys(raiser, k, v, factor)
    shapes = [raiser.types[x].shape for x in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes) or shapes[0][3] != shapes[1][3]:
        return "its operands are not [B, heads, S, head_dim]"
    if int(shapes[0][1]) % int(shapes[1][1]) or shapes[1][1] != shapes[2][1]:
        return "its head counts do not divide"
    attrs = _attrs(factor, False, scores.softcap)
    operands = [q, k, v, None, None, None, scores.sinks]
    made = raiser.insert("attention", operands, attrs, product, ["a"])
    out = made.output
    wanted = raiser.types[product.output]
    if raiser.types[out].shape != wanted.shape:
        shape_attrs = {"args": [In(0), list(wanted.shape)], "kwargs": {}, "types": [wanted]}
        flat = raiser.function.add("aten.reshape.default", [out], shape_attrs, before=product)
        raiser.types[flat.output] = wanted
        out = flat.output
    raiser.function.replace(product.output, out)
    raised.append(Raised(made, scores.terms))
    return None


def _weights_after(raiser: Raiser, softmax: Node) -> tuple[Value, bool]:
    """Return the attention weights, and whether a last column (a sink) was cut off."""
    value = softmax.output
    uses = raiser.function.uses()[value]
    if len(uses) == 1 and base(uses[0][0].op) == "slice":
        node = uses[0][0]
        rank = len(raiser.types[value].shape)
        if raiser.arg(node, 1, "dim", 0) in (-1, rank - 1) and raiser.arg(node, 3, "end") == -1:
            return node.output, True
        width, cut = raiser.types[value].shape[-1], raiser.types[node.output].shape[-1]
        if dim(width - cut) == 1 and raiser.arg(node, 2, "start", 0) == 0:
            return node.output, True
    return value, False


def _value_product(raiser: Raiser, weights: Value) -> tuple[Node | None, Value | None]:
    """Return the product of the weights with v, and v."""
    value = weights
    for _ in range(3):
        uses = raiser.function.uses()[value]
        if len(uses) != 1:
            return None, None
        user = uses[0][0]
        if base(user.op) in ("matmul", "bmm") and user.inputs[0] is value:
            return user, raiser.arg(user, 1)
        if base(user.op) not in ("reshape", "view", "expand", "_unsafe_view"):
            return None, None
        value = user.output
    return None, None


def _scores_before(raiser: Raiser, value: Value, dropped: bool) -> _Scores | str:
    """Walk from the softmax back to the product of q and k."""
    terms: list[Term] = []
    scale, softcap, sinks = 1.0, None, None
    if dropped:
        joined = raiser.made_by(value, "sub")
        if joined is not None:
            # softmax ignores the maximum that is taken off every row.
            value = raiser.arg(joined, 0)
        cat = raiser.made_by(value, "cat")
        if cat is None or len(cat.inputs) != 2 or cat.inputs[0] is None:
            return "its sink column is not joined to the scores"
        sinks = _sink_weight(raiser, cat.inputs[1])
        if sinks is None:
            return "its sink column is not a weight per head"
        value = cat.inputs[0]
    for _ in range(16):
        node = value.node
        if node is None:
            return "its scores are not a product of q and k"
        name = base(node.op)
        if name in PRODUCTS:
            return _product(raiser, node, terms, scale, softcap, sinks)
        if name == "add" and scale == 1.0 and softcap is None:
            a, b = node.inputs[0], node.operand(1)
            if a is None or b is None:
                return f"a number is added to the scores by {node.output.name}"
            scores, other = (a, b) if _leads_to_product(raiser, a) else (b, a)
            terms.append(Term(other, "add"))
            value = scores
        elif name == "scale":
            scale *= node.attrs["factor"]
            value = node.inputs[0]  # type: ignore[assignment]
        elif name == "softcap" and scale == 1.0 and softcap is None:
            softcap = node.attrs["cap"]
            value = node.inputs[0]  # type: ignore[assignment]
        elif name == "masked_fill" and scale == 1.0:
            fill = raiser.scalar(raiser.arg(node, 2))
            if fill is None or fill > -1e4:
                return f"{node.output.name} fills the scores with {fill}"
            terms.append(Term(raiser.arg(node, 1), "block"))
            value = raiser.arg(node, 0)
        elif name == "where" and scale == 1.0:
            fill = _fill_value(raiser, raiser.arg(node, 2))
            if fill is None or fill > -1e4:
                return f"{node.output.name} chooses between two computed scores"
            terms.append(Term(raiser.arg(node, 0), "allow"))
            value = raiser.arg(node, 1)
        elif name in ("maximum", "max") and _fill_value(raiser, raiser.arg(node, 1)) is not None:
            # A floor under masked scores: far below any score, it changes nothing.
            if (_fill_value(raiser, raiser.arg(node, 1)) or 0.0) > -1e30:
                return f"{node.output.name} puts a floor under the scores"
            value = raiser.arg(node, 0)
        elif name in ("view", "reshape", "_unsafe_view"):
            value = raiser.arg(node, 0)
        else:
            return f"its scores pass through {node.op} ({node.output.name})"
    return "its scores are not a product of q and k"


def _fill_value(raiser: Raiser, item: Any) -> float | None:
    """Return the number a tensor is filled with."""
    number = raiser.scalar(item)
    if number is not None:
        return float(number)
    full = raiser.made_by(item, "full", "full_like", "scalar_tensor")
    if full is not None:
        place = 0 if base(full.op) == "scalar_tensor" else 1
        filled = raiser.scalar(raiser.arg(full, place))
        return None if filled is None else float(filled)
    return None


def _leads_to_product(raiser: Raiser, value: Value) -> bool:
    """True where the value is scores: a few elementwise steps from a batched product."""
    through = (
        "scale",
        "softcap",
        "max",
        "maximum",
        "add",
        "view",
        "reshape",
        "_unsafe_view",
        "masked_fill",
        "where",
    )
    frontier = [value]
    for _ in range(12):
        following: list[Value] = []
        for item in frontier:
            if raiser.made_by(item, *PRODUCTS) is not None:
                return True
            node = raiser.made_by(item, *through)
            if node is not None:
                following.extend(v for v in node.inputs if v is not None)
        frontier = following
    return False


def _product(
    raiser: Raiser,
    node: Node,
    terms: list[Term],
    scale: float,
    softcap: float | None,
    sinks: Value | None,
) -> _Scores | str:
    offset = 0
    inner = 1.0
    if base(node.op) == "baddbmm":
        beta, alpha = raiser.arg(node, 3, "beta", 1), raiser.arg(node, 4, "alpha", 1)
        if beta != 1 and beta != 0:
            return f"{node.output.name} scales what it adds by {beta}"
        if beta == 1 and (scale != 1.0 or softcap is not None):
            return f"{node.output.name} adds before the scores are scaled"
        if beta == 1:
            terms.append(Term(raiser.arg(node, 0), "add"))
        offset, inner = 1, float(alpha)
    q, turned = raiser.arg(node, offset), raiser.arg(node, offset + 1)
    k = _untranspose(raiser, turned)
    if k is None:
        return f"the second operand of {node.output.name} is not a transpose of keys"
    if softcap is not None and terms and any(t.kind == "add" for t in terms) and inner != 1.0:
        return "its scores are scaled in an order that has no form"
    return _Scores(q, k, scale * inner, softcap, terms, sinks)


def _untranspose(raiser: Raiser, value: Value) -> Value | None:
    """Return the keys [..., T, D] of [..., D, T]; the transpose may be under a reshape."""
    node = raiser.made_by(value, "transpose")
    if node is not None:
        axes = {raiser.arg(node, 1), raiser.arg(node, 2)}
        rank = len(raiser.types[value].shape)
        if axes in ({-1, -2}, {rank - 1, rank - 2}):
            return raiser.arg(node, 0)
        return None
    scaled = raiser.made_by(value, "scale")
    reshape = raiser.made_by(value, "reshape", "view")
    outer = scaled or reshape
    if outer is None or outer.inputs[0] is None:
        return None
    inner = _untranspose(raiser, outer.inputs[0])
    if inner is None:
        return None
    if scaled is not None:
        return raiser.insert("scale", [inner], dict(scaled.attrs), scaled).output
    assert reshape is not None
    *rest, width, length = raiser.types[value].shape
    kind = Type((*rest, length, width), raiser.types[value].dtype)
    attrs = {"args": [In(0), list(kind.shape)], "kwargs": {}, "types": [kind]}
    made = raiser.function.add("aten.reshape.default", [inner], attrs, before=reshape)
    raiser.types[made.output] = kind
    return made.output


def _as_heads(raiser: Raiser, value: Value, before: Node) -> Value | None:
    """Return [B*H, S, D] as the [B, H, S, D] it was made of."""
    if len(raiser.types[value].shape) == 4:
        return value
    reshape = raiser.made_by(value, "reshape", "view", "_unsafe_view")
    if reshape is None:
        return None
    inner = raiser.arg(reshape, 0)
    return inner if len(raiser.types[inner].shape) == 4 else None


def _sink_weight(raiser: Raiser, value: Value | None) -> Value | None:
    """Return the weight [H] that a sink column [B, H, S, 1] repeats."""
    while isinstance(value, Value):
        if raiser.is_weight(value):
            return value if len(raiser.types[value].shape) == 1 else None
        node = raiser.made_by(value, "reshape", "view", "expand", "unsqueeze", "slice", "to")
        if node is None:
            return None
        value = raiser.arg(node, 0)
    return None
