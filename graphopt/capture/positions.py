"""Recognising rotary tables, masks and positions by evaluating their graph on small grids."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.capture.attention import Term
from graphopt.capture.hoist import LayerKind
from graphopt.capture.rewriting import Raiser, base, close
from graphopt.capture.rotary import ROTARY, Ntk, Rotaries, recognise
from graphopt.ir.graph import In, Node, Value
from graphopt.ir.ops.aten import map_leaves
from graphopt.ir.types import B, P, S, Type

# Rotary ---------------------------------------------------------------------------------------

_ROPE_OPS = {
    "mul", "add", "sub", "neg", "cat", "slice", "split", "chunk", "stack", "view", "reshape",
    "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "expand", "index", "select",
    "unbind", "view_as_complex", "view_as_real", "scale", "split_with_sizes", "permute",
    "_unsafe_view", "contiguous", "narrow", "type_as", "to", "addcmul", "swap_heads",
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
"""cos and sin [B, S, R/2], values of the shell."""


@dataclass
class RopeTables:
    """Makes one `rope_table` in the shell for every distinct pair of tables."""

    shell: Raiser
    position_ids: Value
    rotaries: Rotaries
    _made: dict[tuple[Value, ...], Halves | None] = field(default_factory=dict)

    def halves(self, tables: tuple[Value, ...], form: _RopeForm) -> Halves | None:
        """Return cos and sin [B, S, R/2] for shell values that hold a rotary table."""
        key = (*tables, form)  # type: ignore[assignment]
        if key not in self._made:
            self._made[key] = self._recognise(tables, form)  # type: ignore[index]
        return self._made[key]  # type: ignore[index]

    def _recognise(self, tables: tuple[Value, ...], form: _RopeForm) -> Halves | None:
        positions = torch.tensor([[0, 1, 2, 3, 7, 40], [5, 0, 11, 200, 33, 2]])
        for node in self.shell.region(list(tables), [self.position_ids]):
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
        """Return what a node of the shell makes: of one that is there, or of a new one."""
        shell = self.shell
        for node in shell.function.nodes:
            if node.op == op and node.inputs == operands and node.attrs == attrs:
                return node.outputs
        # In front of everything, behind those it reads.
        own = [shell.function.nodes.index(v.node) for v in operands if v.node is not None]
        before = shell.function.nodes[max(own, default=-1) + 1]
        outputs = max(len(names), 1)
        return shell.insert(op, operands, attrs, before, names, outputs=outputs).outputs

    def _constant(self, name: str, value: Tensor) -> Value:
        """Return the shell's slot for a constant, which equal ones share."""
        shell, stem = self.shell, name
        for slot, constant in shell.constants.items():
            if slot.rstrip("_") == stem and torch.equal(constant, value):
                return shell.function.weights[slot]
        while name in shell.function.weights:
            name += "_"
        shell.constants[name] = value
        return shell.add_weight(name, tuple(value.shape), torch.float32)

    def _values(
        self, tables: tuple[Value, ...], form: _RopeForm, positions: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return cos and sin over [2, 6, R/2], in fp64, for given positions."""
        batch, length = positions.shape
        boundary = {self.position_ids: positions}
        sizes = {B: batch, S: length, P: 0}
        try:
            for node in self.shell.region(list(tables), [self.position_ids]):
                if node.op == ROTARY and node.inputs[0] is not None:
                    (given,) = self.shell.evaluate([node.inputs[0]], boundary, sizes)
                    made = self.rotaries.of(node).tables(given)
                    boundary |= dict(zip(node.outputs, made, strict=True))
            raw = self.shell.evaluate(list(tables), boundary, sizes)
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
        shell = self.shell
        fixed: set[Value] = set(shell.function.weights.values())
        for node in shell.region(list(tables), [self.position_ids]):
            operands = [v for v in node.inputs if v is not None]
            if all(v in fixed for v in operands):
                fixed.update(node.outputs)
                candidates = [*operands, *node.outputs]
            else:
                candidates = [v for v in operands if v in fixed]
            for value in candidates:
                try:
                    (tensor,) = shell.evaluate([value], {}, {B: 1, S: 1, P: 0})
                except (KeyError, RuntimeError, ValueError):
                    continue
                if tensor.is_floating_point() and tensor.numel() == pairs:
                    yield tensor.reshape(pairs)
                    yield -tensor.reshape(pairs)
        yield torch.atan2(sin[0, 1], cos[0, 1])


def raise_ropes(kind: LayerKind, tables: RopeTables) -> None:
    """Raise every rotation, outermost candidates first.

    Runs before moves are raised, since a rotation's own slices must not be taken for a choice
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
            for stub in kind.stubs:
                places = [raiser.function.params.index(t) for t in ordered]
                pair = tables.halves(tuple(stub.inputs[p] for p in places), form)  # type: ignore[misc]
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
    return kind.add_param(name, values, tables.shell)


def _moving_values(kind: LayerKind, tables: RopeTables) -> set[Value]:
    """Return the layer's values that depend on the hidden stream, not on positions alone."""
    raiser = kind.raiser
    fixed: set[Value] = set()
    for param in raiser.function.params:
        arguments = kind.arguments(param)
        try:
            for argument in set(arguments):
                tables.shell.region([argument], [tables.position_ids])
                if _depends_on_weights(tables.shell, argument):
                    raise KeyError(argument.name)
        except KeyError:
            continue
        fixed.add(param)
    return {v for v in raiser.function.values() if v not in fixed and raiser.constant(v) is None}


def _depends_on_weights(shell: Raiser, value: Value) -> bool:
    nodes = shell.region([value], [])
    return any(
        base(node.op) == "layer" or any(v is not None and shell.is_weight(v) for v in node.inputs)
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


# Masks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskForm:
    """A closed form of which keys a query sees, or a bias that follows from key positions."""

    causal: bool = False
    window: int | None = None
    chunk: int | None = None
    padding: bool = False
    slopes: tuple[float, ...] | None = None


_LENGTH = 9
_SMALL_WINDOW = 3
_LONGEST_TABLE = 4096


def padded_masks(length: int) -> Tensor:
    """Return attention masks [4, length]: full, padded left by one and by four, and right."""
    mask = torch.ones(4, length, dtype=torch.long)
    mask[1, :1] = 0
    mask[2, :4] = 0
    mask[3, -2:] = 0
    return mask


def positions_of(mask: Tensor) -> Tensor:
    """Return the positions of real tokens, 0 at padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class MaskRecogniser:
    """Finds closed forms of mask terms by evaluating the shell on a small grid."""

    def __init__(self, shell: Raiser, inputs: dict[str, Value]) -> None:
        self.shell = shell
        self.inputs = inputs
        self._known: dict[tuple[Value, str, int], MaskForm | None] = {}

    def form(self, value: Value, kind: str, heads: int) -> MaskForm | None:
        """Return the closed form of a term of the scores; None if it has none."""
        key = (value, kind, heads)
        if key not in self._known:
            fixed = not self._reads_ids(value)
            self._known[key] = self._recognise(value, kind, heads) if fixed else None
        return self._known[key]

    def _reads_ids(self, value: Value) -> bool:
        """Return whether a mask depends on which tokens a text has, as one of documents does."""
        reads = {self.inputs[name] for name in ("input_ids",) if name in self.inputs}
        for node in self.shell.region([value], []):
            if base(node.op) not in _SHAPE_ALONE and not reads.isdisjoint(node.inputs):
                reads.update(node.outputs)
        return value in reads

    def _recognise(self, value: Value, kind: str, heads: int) -> MaskForm | None:
        allowed = self._allowed(value, kind, {})
        if allowed is None:
            return self._alibi(value, heads) if kind == "add" else None
        for padding in (True, False):
            for causal in (True, False):
                form = MaskForm(causal=causal, padding=padding)
                if self._fits(allowed, form):
                    # A window or chunk longer than the grid is not seen at full size; with its
                    # number made small in the graph, or on the table's full length, it is.
                    return self._baked_window(value, kind) or self._with_length(value, kind, form)
        baked = self._baked_window(value, kind)
        if baked is not None:
            return baked
        for number in self._numbers(value):
            direct = self._with_length(value, kind, MaskForm(causal=True, padding=True), number)
            if direct is not None and (direct.window or direct.chunk):
                return direct
        return None

    def _baked_window(self, value: Value, kind: str) -> MaskForm | None:
        """Find a window in a mask that is a table: its length is in no number of the graph."""
        tables = [
            constant.shape[-1]
            for node in self.shell.region([value], [])
            for operand in node.inputs
            if operand is not None and (constant := self.shell.constant(operand)) is not None
            and constant.dim() >= 2
        ]  # fmt: skip
        if not tables:
            return None
        length = max(_LENGTH, min(max(tables), _LONGEST_TABLE))
        allowed = self._allowed(value, kind, {}, length)
        if allowed is None:
            return None
        window = int(allowed[0, -1].sum())
        for padding in (True, False):
            form = MaskForm(True, window if window < length else None, padding=padding)
            if form.window is not None and self._fits(allowed, form):
                return form
        return None

    def _with_length(
        self, value: Value, kind: str, form: MaskForm, only: int | None = None
    ) -> MaskForm | None:
        for number in [only] if only is not None else self._numbers(value):
            small = self._allowed(value, kind, {number: _SMALL_WINDOW})
            if small is None:
                continue
            for field_name in ("window", "chunk"):
                trial = dataclasses.replace(form, **{field_name: _SMALL_WINDOW})  # type: ignore[arg-type]
                if self._fits(small, trial):
                    return dataclasses.replace(form, **{field_name: number})  # type: ignore[arg-type]
            if only is None and not self._fits(small, form):
                # The number matters to the mask in a way that is neither a window nor a chunk.
                return None
        return form if only is None else None

    def _numbers(self, value: Value) -> list[int]:
        """Return the whole numbers over 1 that the graph of `value` mentions."""
        found: list[int] = []

        def look(leaf: Any) -> Any:
            if isinstance(leaf, int) and not isinstance(leaf, bool) and 1 < leaf < 2**31:
                found.append(leaf)
            return leaf

        for node in self.shell.region([value], []):
            if "." in node.op and base(node.op) in _ARITHMETIC:
                map_leaves(node.attrs["args"], look)
        return sorted(set(found))

    def _allowed(
        self, value: Value, kind: str, numbers: dict[int, int], length: int = _LENGTH
    ) -> Tensor | None:
        """Return which keys are seen, bool [4, S, T]; None where the value is no mask."""
        result = self._evaluate(value, numbers, length)
        if result is None:
            return None
        if kind == "add":
            if result.dtype == torch.bool:
                return None
            blocked = result < -1e4
            if bool((result[~blocked] != 0).any()):
                return None
            result = ~blocked
        elif result.dtype != torch.bool:
            return None
        elif kind == "block":
            result = ~result
        shape = result.shape
        if result.dim() == 3 and shape[0] % 4 == 0 and shape[0] != 4:
            result = result.reshape(4, shape[0] // 4, *shape[1:])
        if result.dim() == 2:
            result = result[None, None]
        if result.dim() != 4:
            return None
        if result.shape[1] > 1 and not bool((result == result[:, :1]).all()):
            return None
        try:
            return result[:, 0].expand(4, length, length)
        except RuntimeError:
            return None

    def _evaluate(
        self, value: Value, numbers: dict[int, int], length: int = _LENGTH
    ) -> Tensor | None:
        mask = padded_masks(length)
        values = {"attention_mask": mask, "position_ids": positions_of(mask)}
        boundary = {self.inputs[n]: v for n, v in values.items() if n in self.inputs}
        if "input_ids" in self.inputs:
            boundary[self.inputs["input_ids"]] = torch.ones_like(mask)
        shell = self.shell
        changed: list[tuple[Node, Any]] = []
        try:
            for node in shell.region([value], []) if numbers else []:
                if "." in node.op and base(node.op) in _ARITHMETIC:
                    changed.append((node, copy.copy(node.attrs["args"])))
                    node.attrs["args"] = map_leaves(
                        node.attrs["args"],
                        lambda leaf: numbers.get(leaf, leaf) if type(leaf) is int else leaf,
                    )
            (result,) = shell.evaluate([value], boundary, {B: 4, S: length, P: 0})
        except (KeyError, RuntimeError, ValueError, IndexError, TypeError):
            return None
        finally:
            for node, args in changed:
                node.attrs["args"] = args
        return result

    def _fits(self, allowed: Tensor, form: MaskForm) -> bool:
        """Compare with a closed form on the rows of real tokens; padded rows don't matter."""
        length = allowed.shape[-1]
        mask = padded_masks(length).bool()
        query = torch.arange(length)[:, None]
        key = torch.arange(length)[None, :]
        wanted = torch.ones(length, length, dtype=torch.bool)
        if form.causal:
            wanted &= key <= query
        if form.window is not None:
            wanted &= key > query - form.window
        if form.chunk is not None:
            wanted &= key // form.chunk == query // form.chunk
        full = wanted[None].expand(4, -1, -1)
        if form.padding:
            full = full & mask[:, None, :]
        rows = mask[:, :, None].expand_as(full)
        return bool((allowed[rows] == full[rows]).all())

    def _alibi(self, value: Value, heads: int) -> MaskForm | None:
        """Match slope_h times key position, up to what a whole row shares."""
        result = self._evaluate(value, {})
        if result is None or not result.is_floating_point() or result.dim() < 3:
            return None
        mask = padded_masks(_LENGTH)
        try:
            bias = result.reshape(-1, heads, *result.shape[-2:])
            bias = bias.expand(4, heads, _LENGTH, _LENGTH).double()
        except RuntimeError:
            return None
        positions = positions_of(mask).double()
        # Rows of the unpadded example, keys 0 and 1 of its last query give each slope.
        slopes = bias[0, :, -1, 1] - bias[0, :, -1, 0]
        wanted = slopes[None, :, None, None] * positions[:, None, None, :]
        difference = bias - wanted
        for b in range(4):
            keys = mask[b].bool()
            for q in range(_LENGTH):
                seen = keys & (torch.arange(_LENGTH) <= q)
                if not keys[q]:
                    continue
                row = difference[b, :, q][:, seen]
                if not bool(
                    (row - row[:, :1]).abs().max() <= 1e-5 * max(1.0, float(slopes.abs().max()))
                ):
                    return None
        if not bool((slopes != 0).any()):
            return None
        return MaskForm(slopes=tuple(float(s) for s in slopes))


_SHAPE_ALONE = {
    "ones_like", "zeros_like", "full_like", "empty_like", "new_ones", "new_zeros", "new_full",
    "new_empty",
}  # fmt: skip
"""Ops that read no more of a tensor than its shape, dtype and device."""

_ARITHMETIC = {
    "add", "sub", "rsub", "lt", "le", "gt", "ge", "eq", "ne", "floor_divide", "div", "remainder",
    "mul", "tril", "triu", "fmod",
}  # fmt: skip


def set_masks(
    kind: LayerKind, shell: Raiser, inputs: dict[str, Value], recogniser: MaskRecogniser
) -> list[tuple[str, str]]:
    """Turn the terms of every attention into attributes, or leave them as an additive bias.

    Returns:
        (value name, reason) for terms without a closed form.
    """
    notes: list[tuple[str, str]] = []
    kind.attrs = kind.attrs or [{} for _ in kind.stubs]
    for number, item in enumerate(kind.raised):
        node = item.node
        suffix = "" if number == 0 else f"_{number}"
        while len(node.inputs) < 7:
            node.inputs.append(None)
        # Where one term is a plain causal mask, its rows decide which keys a bias is added to.
        assert node.inputs[0] is not None
        heads = int(kind.raiser.types[node.inputs[0]].shape[1])
        forms = [_forms(kind, recogniser, term, heads) for term in item.terms]
        per_call: list[dict[str, Any]] = [
            {"causal": node.attrs["causal"], "window": None, "chunk": None} for _ in kind.stubs
        ]
        padding = False
        slopes: tuple[float, ...] | None = None
        biases: list[Term] = []
        for term, found in zip(item.terms, forms, strict=True):
            if found is None:
                biases.append(term)
                continue
            if found[0].slopes is not None:
                slopes = found[0].slopes
                continue
            for attrs, form in zip(per_call, found, strict=True):
                attrs["causal"] = attrs["causal"] or form.causal
                attrs["window"] = attrs["window"] or form.window
                attrs["chunk"] = attrs["chunk"] or form.chunk
                padding = padding or form.padding
        if (padding or slopes is not None) and "attention_mask" in inputs:
            node.inputs[3] = _input_param(kind, shell, "attention_mask", inputs)
        if slopes is not None:
            node.inputs[5] = _slope_slot(kind.raiser, slopes)
        if biases:
            node.inputs[4] = _bias(kind, node, biases)
            notes += [(t.value.name, "mask without a closed form, kept additive") for t in biases]
        for key in ("causal", "window", "chunk"):
            values = [attrs[key] for attrs in per_call]
            if all(value == values[0] for value in values):
                node.attrs[key] = values[0]
            else:
                from graphopt.ir.graph import Param

                node.attrs[key] = Param(key + suffix)
                for call_attrs, value in zip(kind.attrs, values, strict=True):
                    call_attrs[key + suffix] = value
        while node.inputs and node.inputs[-1] is None:
            node.inputs.pop()
        item.terms = []
    return notes


def _forms(
    kind: LayerKind, recogniser: MaskRecogniser, term: Term, heads: int
) -> list[MaskForm] | None:
    """Return each call's closed form of a term; None if some call's has none."""
    if term.value not in kind.raiser.function.params:
        return None
    forms = [recogniser.form(value, term.kind, heads) for value in kind.arguments(term.value)]
    known = [form for form in forms if form is not None]
    if len(known) != len(forms) or len({f.padding for f in known}) > 1:
        return None
    if len({f.slopes for f in known}) > 1:
        return None
    return known


def _input_param(kind: LayerKind, shell: Raiser, name: str, inputs: dict[str, Value]) -> Value:
    values = [inputs[name]] * len(kind.stubs)
    for param in kind.raiser.function.params:
        if kind.arguments(param) == values:
            return param
    return kind.add_param(name, values, shell)


def _slope_slot(raiser: Raiser, slopes: tuple[float, ...]) -> Value:
    """Return the layer's constant slot that holds the slopes."""
    slot = "alibi.slopes"
    if slot in raiser.function.weights:
        return raiser.function.weights[slot]
    raiser.constants[slot] = torch.tensor(slopes, dtype=torch.float32)
    return raiser.add_weight(slot, (len(slopes),), torch.float32)


def _bias(kind: LayerKind, node: Node, terms: list[Term]) -> Value:
    """Return the sum of terms as one additive bias; a bool becomes 0 and minus infinity."""
    raiser = kind.raiser
    total: Value | None = None
    for term in terms:
        value = term.value
        if len(raiser.types[value].shape) == 3:
            heads = int(raiser.types[node.inputs[0]].shape[1])  # type: ignore[index]
            _, *rest = raiser.types[value].shape
            value = _aten(raiser, "aten.reshape.default", value, [In(0), [B, heads, *rest]],
                          Type((B, heads, *rest), raiser.types[value].dtype), node)  # fmt: skip
        if term.kind != "add":
            if term.kind == "block":
                value = _aten(raiser, "aten.logical_not.default", value, [In(0)],
                              Type(raiser.types[value].shape, torch.bool), node)  # fmt: skip
            value = _aten(raiser, "aten.where.Scalar", value, [In(0), 0.0, float("-inf")],
                          Type(raiser.types[value].shape, torch.float32), node)  # fmt: skip
        total = value if total is None else raiser.insert("add", [total, value], {}, node).output
    assert total is not None
    return total


def _aten(raiser: Raiser, op: str, x: Value, args: list[Any], kind: Type, before: Node) -> Value:
    node = raiser.function.add(
        op, [x], {"args": args, "kwargs": {}, "types": [kind]}, before=before
    )
    raiser.types[node.output] = kind
    return node.output


# Positions ------------------------------------------------------------------------------------


def raise_position_embeddings(shell: Raiser, inputs: dict[str, Value]) -> None:
    """Learned positions: an embedding whose ids are position_ids plus a number."""
    if "position_ids" not in inputs and "attention_mask" not in inputs:
        return
    mask = padded_masks(_LENGTH)
    wanted = positions_of(mask)
    real = mask.bool()
    for node in list(shell.function.nodes):
        if node.op != "embedding" or node.inputs[0] in inputs.values():
            continue
        ids = node.inputs[0]
        assert ids is not None
        values = {"attention_mask": mask, "position_ids": wanted}
        boundary = {inputs[n]: v for n, v in values.items() if n in inputs}
        try:
            (found,) = shell.evaluate([ids], boundary, {B: 4, S: _LENGTH, P: 0})
        except (KeyError, RuntimeError, ValueError, IndexError):
            continue
        if found.numel() != wanted.numel():
            continue
        found = found.reshape(wanted.shape)
        offset = int(found[0, 0])
        if bool((found[real] == wanted[real] + offset).all()) and "position_ids" in inputs:
            attrs = {"offset": offset} if offset else {}
            operands = [inputs["position_ids"], node.inputs[1]]
            kind = shell.types[node.output]
            made = shell.insert("embedding", operands, attrs, node, ["p"]).output
            if shell.types[made] != kind:
                made = _aten(shell, "aten.reshape.default", made, [In(0), list(kind.shape)],
                             kind, node)  # fmt: skip
            shell.function.replace(node.output, made)
    shell.sweep()
