"""Recognising rotations of queries and keys, and the tables of cosines and sines behind them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.capture.hoist import LayerKind
from graphopt.capture.rewriting import Raiser, base, close
from graphopt.capture.rotary import ROTARY, Ntk, Rotaries, recognise
from graphopt.ir.graph import Node, Value
from graphopt.ir.types import B, P, S

_ROPE_OPS = {
    "mul", "add", "sub", "neg", "cat", "slice", "split", "chunk", "stack", "view", "reshape",
    "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "expand", "index", "select",
    "unbind", "view_as_complex", "view_as_real", "scale", "split_with_sizes", "permute",
    "_unsafe_view", "contiguous", "narrow", "type_as", "to", "addcmul", "transpose_heads",
    "repeat_interleave",
}  # fmt: skip
_ROPE_ENDS = ("cat", "add", "view", "reshape", "flatten", "_unsafe_view")
_MOST_ROPE_NODES = 40


@dataclass(frozen=True)
class _RopeForm:
    """How a rotation uses its tables: pairs as halves or neighbours, and the tables' layout."""

    interleaved: bool
    heads_first: bool
    sign: int  # -1 where the rotation runs the other way
    layout: str  # "full" tables have one entry a feature, "half" one a pair, "complex" both


Halves = tuple[Value, Value]
"""cos and sin [B, S, R/2], values of the outer graph."""


@dataclass
class RopeTables:
    """Makes one `rope_table` in the outer graph for every distinct pair of tables."""

    outer: Raiser
    position_ids: Value
    rotaries: Rotaries
    _made: dict[tuple[Value, ...], Halves | None] = field(default_factory=dict)

    def halves(self, tables: tuple[Value, ...], form: _RopeForm) -> Halves | None:
        """Return cos and sin [B, S, R/2] for values of the outer graph that hold a rotary table."""
        key = (*tables, form)  # type: ignore[assignment]
        if key not in self._made:
            self._made[key] = self._recognise(tables, form)  # type: ignore[index]
        return self._made[key]  # type: ignore[index]

    def _recognise(self, tables: tuple[Value, ...], form: _RopeForm) -> Halves | None:
        positions = torch.tensor([[0, 1, 2, 3, 7, 40], [5, 0, 11, 200, 33, 2]])
        for node in self.outer.region(list(tables), [self.position_ids]):
            if node.op == ROTARY:
                return self._by_length(tables, form, node)
        cos_sin = self._values(tables, form, positions)
        if cos_sin is None:
            return None
        cos, sin = cos_sin
        scale = float(cos[0, 0, 0])
        if scale == 0 or not close(sin[0, 0], torch.zeros_like(sin[0, 0])):
            return None
        found: Tensor | None = None
        for candidate in self._frequencies(tables, cos.shape[-1], cos, sin):
            angles = positions[..., None].double() * candidate.double()
            # Tables that the source stores in fp32 are good to about 1e-5 at position 200.
            if close(cos, angles.cos() * scale, 2e-5) and close(sin, angles.sin() * scale, 2e-5):
                found = candidate
                break
        if found is None:
            return None
        return self._table(self._constant("rope.inv_freq", found.float()), round(scale, 9))

    def _by_length(self, tables: tuple[Value, ...], form: _RopeForm, node: Node) -> Halves | None:
        """Make the tables of a module whose frequencies depend on the length."""
        record = self.rotaries.of(node)
        first = self._values(tables, form, torch.tensor([[0, 1]]))
        if first is None:
            return None
        pairs = first[0].shape[-1]
        made = recognise(record, pairs, lambda positions: self._values(tables, form, positions))
        if made is None:
            return None
        if isinstance(made, Ntk):
            exponents = self._constant("rope.exponents", made.exponents)
            attrs = {"base": made.base, "factor": made.factor, "length": made.length}
            (value,) = self._node("ntk_frequencies", [self.position_ids, exponents], attrs)
            return self._table(value, made.scale)
        short, long = made
        frequencies = self._choice(
            "rope.inv_freq", short.frequencies, long.frequencies, record.switch
        )
        if short.scale == long.scale:
            return self._table(frequencies, short.scale)
        scale = self._choice(
            "rope.scale", torch.tensor([short.scale]), torch.tensor([long.scale]), record.switch
        )
        cos, sin = self._table(frequencies, 1.0)
        return (
            self._node("mul", [cos, scale], {}, ["cos"])[0],
            self._node("mul", [sin, scale], {}, ["sin"])[0],
        )

    def _choice(self, name: str, short: Tensor, long: Tensor, length: int | None) -> Value:
        """Return `short` up to texts of `length` tokens and `long` beyond."""
        operands = [self._constant(name, short)]
        if length is None or torch.equal(short, long):
            return operands[0]
        operands.append(self._constant(name.replace(".", ".long_"), long))
        return self._node("by_length", [self.position_ids, *operands], {"length": length})[0]

    def _table(self, frequencies: Value, scale: float) -> Halves:
        attrs = {} if scale == 1.0 else {"scale": scale}
        operands = [self.position_ids, frequencies]
        cos, sin = self._node("rope_table", operands, attrs, ["cos", "sin"])
        return cos, sin

    def _node(
        self, op: str, operands: list[Value], attrs: dict[str, Any], names: Sequence[str] = ()
    ) -> list[Value]:
        """Return what a node of the outer graph makes: of one that is there, or of a new one."""
        outer = self.outer
        for node in outer.function.nodes:
            if node.op == op and node.inputs == operands and node.attrs == attrs:
                return node.outputs
        # In front of everything, behind those it reads.
        own = [outer.function.nodes.index(v.node) for v in operands if v.node is not None]
        before = outer.function.nodes[max(own, default=-1) + 1]
        outputs = max(len(names), 1)
        return outer.insert(op, operands, attrs, before, names, outputs=outputs).outputs

    def _constant(self, name: str, value: Tensor) -> Value:
        """Return the outer graph's slot for a constant, which equal ones share."""
        outer, stem = self.outer, name
        for slot, constant in outer.constants.items():
            if slot.rstrip("_") == stem and torch.equal(constant, value):
                return outer.function.weights[slot]
        while name in outer.function.weights:
            name += "_"
        outer.constants[name] = value
        return outer.add_weight(name, tuple(value.shape), torch.float32)

    def _values(
        self, tables: tuple[Value, ...], form: _RopeForm, positions: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return cos and sin over [2, 6, R/2], in fp64, for given positions."""
        batch, length = positions.shape
        boundary = {self.position_ids: positions}
        sizes = {B: batch, S: length, P: 0}
        try:
            for node in self.outer.region(list(tables), [self.position_ids]):
                if node.op == ROTARY and node.inputs[0] is not None:
                    (given,) = self.outer.evaluate([node.inputs[0]], boundary, sizes)
                    made = self.rotaries.of(node).tables(given)
                    boundary |= dict(zip(node.outputs, made, strict=True))
            raw = self.outer.evaluate(list(tables), boundary, sizes)
        except (KeyError, RuntimeError, ValueError, IndexError):
            return None
        parts: list[Tensor] = []
        for tensor in raw:
            if tensor.is_complex():
                parts += [tensor.real, tensor.imag]
            else:
                parts.append(tensor)
        if len(parts) != 2:
            return None
        result: list[Tensor] = []
        for tensor in parts:
            width = tensor.shape[-1]
            if tensor.numel() != batch * length * width:
                return None
            tensor = tensor.reshape(batch, length, width).double()
            if form.layout == "full":
                first, second = (
                    (tensor[..., 0::2], tensor[..., 1::2])
                    if form.interleaved
                    else tensor.chunk(2, -1)
                )
                if not torch.equal(first, second):
                    return None
                tensor = first
            result.append(tensor)
        return result[0], result[1] * form.sign

    def _frequencies(
        self, tables: tuple[Value, ...], pairs: int, cos: Tensor, sin: Tensor
    ) -> Iterator[Tensor]:
        """Yield candidates: constants the table is computed from, then angles at position 1."""
        outer = self.outer
        fixed: set[Value] = set(outer.function.weights.values())
        for node in outer.region(list(tables), [self.position_ids]):
            operands = [v for v in node.inputs if v is not None]
            if all(v in fixed for v in operands):
                fixed.update(node.outputs)
                candidates = [*operands, *node.outputs]
            else:
                candidates = [v for v in operands if v in fixed]
            for value in candidates:
                try:
                    (tensor,) = outer.evaluate([value], {}, {B: 1, S: 1, P: 0})
                except (KeyError, RuntimeError, ValueError):
                    continue
                if tensor.is_floating_point() and tensor.numel() == pairs:
                    yield tensor.reshape(pairs)
                    yield -tensor.reshape(pairs)
        yield torch.atan2(sin[0, 1], cos[0, 1])


def raise_ropes(kind: LayerKind, tables: RopeTables) -> None:
    """Raise every rotation, outermost candidates first.

    Runs before layout ops are raised, since a rotation's own slices must not be taken for a choice
    of weight rows.
    """
    raiser = kind.raiser
    moving = _moving_values(kind, tables)
    for node in reversed(list(raiser.function.nodes)):
        if node in raiser.function.nodes and base(node.op) in _ROPE_ENDS:
            if len(node.outputs) == 1 and _try_rope(kind, tables, node.output, moving):
                raiser.sweep()


def _try_rope(kind: LayerKind, tables: RopeTables, value: Value, moving: set[Value]) -> bool:
    """Replace `value` by a rope if some region behind it is one."""
    raiser = kind.raiser
    if value.node is None or len(raiser.types[value].shape) != 4:
        return False
    for x, found in _rope_regions(raiser, value, moving):
        if raiser.types[x].shape != raiser.types[value].shape:
            continue
        for ordered in (found, found[::-1]) if len(found) == 2 else (found,):
            form = _rope_form(raiser, value, x, ordered)
            if form is None:
                continue
            halves = []
            for layer_call in kind.layer_calls:
                places = [raiser.function.params.index(t) for t in ordered]
                pair = tables.halves(tuple(layer_call.inputs[p] for p in places), form)  # type: ignore[misc]
                halves.append(pair)
            if any(pair is None for pair in halves):
                continue
            cos = _table_param(kind, tables, "cos", [pair[0] for pair in halves if pair])
            sin = _table_param(kind, tables, "sin", [pair[1] for pair in halves if pair])
            attrs: dict[str, Any] = {}
            if form.interleaved:
                attrs["interleaved"] = True
            if not form.heads_first:
                attrs["heads_first"] = False
            raiser.replace(value, "rope", [x, cos, sin], attrs)
            return True
    return False


def _table_param(kind: LayerKind, tables: RopeTables, name: str, values: list[Value]) -> Value:
    for param in kind.raiser.function.params:
        if kind.arguments(param) == values:
            return param
    return kind.add_param(name, values, tables.outer)


def _moving_values(kind: LayerKind, tables: RopeTables) -> set[Value]:
    """Return the layer's values that depend on the hidden stream, not on positions alone."""
    raiser = kind.raiser
    fixed: set[Value] = set()
    for param in raiser.function.params:
        arguments = kind.arguments(param)
        try:
            for argument in set(arguments):
                tables.outer.region([argument], [tables.position_ids])
                if _depends_on_weights(tables.outer, argument):
                    raise KeyError(argument.name)
        except KeyError:
            continue
        fixed.add(param)
    return {v for v in raiser.function.values() if v not in fixed and raiser.constant(v) is None}


def _depends_on_weights(outer: Raiser, value: Value) -> bool:
    nodes = outer.region([value], [])
    return any(
        base(node.op) == "layer" or any(v is not None and outer.is_weight(v) for v in node.inputs)
        for node in nodes
    )


def _rope_regions(
    raiser: Raiser, target: Value, moving: set[Value]
) -> Iterator[tuple[Value, tuple[Value, ...]]]:
    """Yield (x, tables) pairs that together determine `target`, nearest first."""
    order = raiser.node_index()
    frontier: set[Value] = {target}
    tables: list[Value] = []
    for _ in range(_MOST_ROPE_NODES):
        if len(frontier) == 1 and tables and target not in frontier:
            ordered = sorted(tables, key=raiser.function.params.index)
            yield next(iter(frontier)), tuple(ordered)
        grow = [v for v in frontier if v.node is not None and base(v.node.op) in _ROPE_OPS]
        if not grow:
            return
        latest = max(grow, key=lambda value: order[value.node])  # type: ignore[index]
        assert latest.node is not None
        frontier -= set(latest.node.outputs)
        for value in latest.node.inputs:
            if value is None or raiser.constant(value) is not None:
                continue
            if value in moving:
                frontier.add(value)
            elif value in raiser.function.params:
                if value not in tables:
                    tables.append(value)
            else:
                return


def _rope_form(
    raiser: Raiser, target: Value, x: Value, tables: tuple[Value, ...]
) -> _RopeForm | None:
    """Return how the region rotates x by its tables taken as cos, sin; None if it does not."""
    if not 1 <= len(tables) <= 2:
        return None
    sizes = {B: 2, S: 3, P: 0}
    generator = torch.Generator().manual_seed(0)
    boundary = {v: raiser.random(v, sizes, generator) for v in (x, *tables)}
    try:
        (expected,) = raiser.evaluate([target], boundary, sizes)
    except (KeyError, RuntimeError, ValueError, IndexError, TypeError):
        return None
    parts: list[Tensor] = []
    complex_table = False
    for table in tables:
        tensor = boundary[table]
        width = tensor.shape[-1]
        if tensor.numel() not in (2 * 3 * width, 3 * width):
            return None
        tensor = tensor.reshape(-1, 3, width).expand(2, 3, width)
        if tensor.is_complex():
            complex_table = True
            parts += [tensor.real, tensor.imag]
        else:
            parts.append(tensor)
    if len(parts) != 2 or parts[0].shape != parts[1].shape:
        return None
    values = boundary[x]
    for heads_first in (True, False):
        if values.shape[2 if heads_first else 1] != 3:
            continue
        for interleaved in (False, True):
            for layout, sign in itertools.product(("full", "half"), (1, -1)):
                sin = parts[1] * sign
                actual = _rotate(values, parts[0], sin, interleaved, heads_first, layout)
                if actual is not None and close(expected, actual, 1e-9):
                    kind = "complex" if complex_table else layout
                    return _RopeForm(interleaved, heads_first, sign, kind)
    return None


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, heads_first: bool, layout: str
) -> Tensor | None:
    """Rotate with full tables (one entry a feature) or half ones (one a pair)."""
    if layout == "half":
        cos, sin = (
            t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin)
        )
    width = cos.shape[-1]
    if width > x.shape[-1] or width % 2:
        return None
    axis = 1 if heads_first else 2
    cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)
    head, tail = x[..., :width], x[..., width:]
    if interleaved:
        turned = torch.stack((-head[..., 1::2], head[..., 0::2]), -1).flatten(-2)
    else:
        first, second = head.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    return torch.cat((head * cos + turned * sin, tail), -1)
