"""Raising norms that are written out as squares, means and reciprocal roots."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from graphopt.capture.rewriting import NotRaisedError, Raiser, base
from graphopt.ir.graph import Node, Value


def raise_norms(raiser: Raiser) -> None:
    """Find x * rsqrt(mean(x^2) + eps), with or without centring, then its gain and bias."""
    for node in list(raiser.function.nodes):
        eps = _epsilon_of_root(raiser, node)
        if eps is None:
            continue
        for user, _ in raiser.function.uses().get(node.output, []):
            with contextlib.suppress(NotRaisedError):
                _try(raiser, user, node, eps)
    raiser.sweep()


def _epsilon_of_root(raiser: Raiser, node: Node) -> float | None:
    """Return eps where `node` is a root or reciprocal root of something plus eps."""
    name = base(node.op)
    if name not in ("rsqrt", "sqrt", "pow") or len(node.outputs) != 1:
        return None
    if name == "pow" and raiser.arg(node, 1) not in (-0.5, 0.5):
        return None
    inner = raiser.made_by(raiser.arg(node, 0), "add")
    if inner is None or "." not in inner.op:
        return None
    eps = raiser.scalar(raiser.arg(inner, 1))
    return None if eps is None else float(eps)


def _try(raiser: Raiser, user: Node, root: Node, eps: float) -> None:
    """Replace what `user` makes of x and the root, when it is a norm of x."""
    inputs = [v for v in user.inputs if v is not None and v is not root.output]
    if len(user.outputs) != 1 or not inputs:
        return
    candidates: list[tuple[str, Value]] = []
    for value in inputs:
        centred = raiser.made_by(value, "sub")
        if centred is not None and isinstance(raiser.arg(centred, 0), Value):
            candidates.append(("layer_norm", raiser.arg(centred, 0)))
        candidates.append(("rms_norm", value))
    for op, x in candidates:
        attrs = {"eps": eps}
        if not _same_shape(raiser, user.output, x):
            continue
        if raiser.proves(user.output, op, [x], attrs, [x]):
            _with_gain(raiser, user.output, op, x, attrs)
            return


def _same_shape(raiser: Raiser, a: Value, b: Value) -> bool:
    return raiser.types[a].shape == raiser.types[b].shape


def _with_gain(raiser: Raiser, normed: Value, op: str, x: Value, attrs: dict[str, Any]) -> None:
    """Take the gain, its offset and the bias that follow, then replace the whole."""
    weight: Value | None = None
    bias: Value | None = None
    current = normed
    user, other = _only_binary(raiser, current, "mul")
    if user is not None and other is not None:
        plain, offset = _offset_weight(raiser, other, op)
        if plain is not None:
            weight, current = plain, user.output
            if offset:
                attrs["offset"] = offset
            after, term = _only_binary(raiser, current, "add")
            if op == "layer_norm" and after is not None and term is not None:
                if raiser.is_weight(term):
                    bias, current = term, after.output
    raiser.replace(current, op, [x, weight, bias], attrs, "h")


def _only_binary(raiser: Raiser, value: Value, name: str) -> tuple[Node | None, Value | None]:
    """Return the only reader of `value`, if it is a sum or product with another tensor."""
    uses = raiser.function.uses()[value]
    if len(uses) != 1 or value in raiser.function.results or base(uses[0][0].op) != name:
        return None, None
    user = uses[0][0]
    others = [v for v in user.inputs if v is not None and v is not value]
    if len(others) != 1 or not _same_shape(raiser, user.output, value):
        return None, None
    return user, others[0]


def _offset_weight(raiser: Raiser, value: Value, op: str) -> tuple[Value | None, float]:
    """Return (weight, offset) for `weight` or `weight + offset`."""
    if raiser.is_weight(value):
        return value, 0.0
    added = raiser.made_by(value, "add")
    if added is None or "." not in added.op or op != "rms_norm":
        return None, 0.0
    a, b = raiser.arg(added, 0), raiser.arg(added, 1)
    if not isinstance(a, Value):
        a, b = b, a
    offset = raiser.scalar(b)
    if isinstance(a, Value) and raiser.is_weight(a) and offset is not None:
        if raiser.types[value].dtype == torch.float32:
            return a, float(offset)
    return None, 0.0
