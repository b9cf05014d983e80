"""Raising elementwise formulas of one variable, by evaluating them against closed forms."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from graphopt.capture.rewriting import NotRaisedError, Raiser, base, close
from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import get_op
from graphopt.ir.types import B, P, S

_POINTWISE = {
    "add", "sub", "mul", "div", "neg", "pow", "square", "exp", "erf", "tanh", "sigmoid", "relu",
    "silu", "scale", "clamp", "rsub", "abs", "sqrt", "relu2", "clamp_min", "softplus", "log1p",
    "reciprocal", "leaky_relu", "hardtanh",
}  # fmt: skip
_CLOSED_FORMS = ("relu", "relu2", "silu", "sigmoid", "tanh", "gelu", "gelu_tanh", "quick_gelu")
_MOST_NODES = 12
_NEAR = torch.linspace(-7.0, 7.0, 281, dtype=torch.float64)
_FAR = torch.tensor([8.0, 12.0, 30.0, 100.0, 1e3, 1e4, 7e4, 1e6, 1e12, 1e30], dtype=torch.float64)
_LAST = len(_NEAR) - 1
_POINTS = torch.cat((_NEAR, -_FAR, _FAR))
"""Where a formula is compared: closely where it bends, and far out, where a clamp would show."""


def raise_activations(raiser: Raiser) -> None:
    """Replace the largest formulas first, from the last node to the first."""
    for node in reversed(list(raiser.function.nodes)):
        if node not in raiser.function.nodes or base(node.op) not in _POINTWISE:
            continue
        if len(node.outputs) != 1 or node.output not in raiser.types:
            continue
        best: tuple[Value, str, dict[str, float]] | None = None
        for source, count in _single_sources(raiser, node):
            values = _curve(raiser, node.output, source)
            if values is None:
                continue
            match = _closed_form(values, count)
            if match is not None:
                best = (source, *match)
        if best is not None and not (best[1] == node.op and not best[2]):
            with contextlib.suppress(NotRaisedError):
                raiser.replace(node.output, best[1], [best[0]], best[2])
    raiser.sweep()


def _single_sources(raiser: Raiser, node: Node) -> Iterator[tuple[Value, int]]:
    """Yield every value that alone determines the node's output elementwise, nearest first."""
    order = raiser.node_index()
    region = {node}
    frontier = _varying(raiser, node)
    while frontier:
        if len(frontier) == 1:
            yield next(iter(frontier)), len(region)
        grow = [v for v in frontier if v.node is not None and base(v.node.op) in _POINTWISE]
        if not grow or len(region) >= _MOST_NODES:
            return
        latest = max(grow, key=lambda value: order[value.node])  # type: ignore[index]
        assert latest.node is not None
        frontier.remove(latest)
        region.add(latest.node)
        frontier |= _varying(raiser, latest.node)


def _varying(raiser: Raiser, node: Node) -> set[Value]:
    return {v for v in node.inputs if v is not None and raiser.scalar(v) is None}


def _curve(raiser: Raiser, target: Value, source: Value) -> Tensor | None:
    """Return the formula's values over `_POINTS`; None where it is not one."""
    if raiser.types[source].shape != raiser.types[target].shape:
        return None
    if not raiser.types[source].dtype.is_floating_point or raiser.slot(source) is not None:
        return None
    curves: list[Tensor] = []
    # One length would hide that a formula counts tokens, as a division by their number does.
    for sizes in ({B: 1, S: 1, P: 0}, {B: 2, S: 3, P: 0}):
        try:
            (values,) = raiser.evaluate([target], {source: _POINTS}, sizes)
        except (KeyError, RuntimeError, ValueError, IndexError):
            return None
        curves.append(values)
    values, other = curves
    same = values.shape == other.shape == _POINTS.shape and values.equal(other)
    return values if same else None


def _closed_form(values: Tensor, count: int) -> tuple[str, dict[str, float]] | None:
    """Return (op, attributes) of the closed form with these values over `_POINTS`."""
    slope = float(values[_LAST] / _NEAR[-1])
    if math.isfinite(slope) and slope != 0 and _agree(values, _POINTS * slope, 1e-12):
        return "scale", {"factor": slope}
    for name in _CLOSED_FORMS:
        if _agree(values, get_op(name).reference([_POINTS], {})[0], 2e-7):
            return name, {}
    cap = _cap(values) if count > 1 else None
    return None if cap is None else ("softcap", {"cap": cap})


def _agree(values: Tensor, formula: Tensor, tolerance: float) -> bool:
    """Compare near zero relative to the largest value there, and far out each by itself."""
    count = len(_NEAR)
    far, wanted = values[count:], formula[count:]
    return close(values[:count], formula[:count], tolerance) and bool(
        ((far - wanted).abs() <= 1e-6 * wanted.abs()).all()
    )


def _cap(values: Tensor) -> float | None:
    """Solve cap tanh(x / cap) = y at the last point by bisection, then compare everywhere."""
    y, x = float(values[_LAST]), float(_NEAR[-1])
    if not 0 < y < x * (1 - 1e-12):
        return None
    low, high = y, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        if middle * math.tanh(x / middle) < y:
            low = middle
        else:
            high = middle
    # Caps are written as short decimals; bisection is exact to about nine digits.
    cap = float(f"{low:.7g}")
    return cap if _agree(values, cap * torch.tanh(_POINTS / cap), 1e-7) else None
