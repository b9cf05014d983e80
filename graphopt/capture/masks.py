"""Recognising attention masks by evaluating their graph on small grids."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.capture.rewriting import Raiser, base
from graphopt.ir.graph import Node, Value
from graphopt.ir.ops.aten import map_leaves
from graphopt.ir.types import B, P, S

_SHAPE_ALONE = {
    "ones_like", "zeros_like", "full_like", "empty_like", "new_ones", "new_zeros", "new_full",
    "new_empty",
}  # fmt: skip
"""Ops that read no more of a tensor than its shape, dtype and device."""

_ARITHMETIC = {
    "add", "sub", "rsub", "lt", "le", "gt", "ge", "eq", "ne", "floor_divide", "div", "remainder",
    "mul", "tril", "triu", "fmod",
}  # fmt: skip


@dataclass(frozen=True)
class MaskForm:
    """A closed form of which keys a query sees, or a bias that follows from key positions."""

    causal: bool = False
    window: int | None = None
    chunk: int | None = None
    padding: bool = False
    slopes: tuple[float, ...] | None = None


GRID_LENGTH = 9
_SMALL_WINDOW = 3
_LONGEST_TABLE = 4096
_BLOCKED = -1e4
"""What is added to a score is less where a key is not seen."""


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
    """Finds closed forms of mask terms by evaluating the outer graph on a small grid."""

    def __init__(self, outer: Raiser, inputs: dict[str, Value]) -> None:
        self.outer = outer
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
        for node in self.outer.region([value], []):
            if base(node.op) not in _SHAPE_ALONE and not reads.isdisjoint(node.inputs):
                reads.update(node.outputs)
        return value in reads

    def _recognise(self, value: Value, kind: str, heads: int) -> MaskForm | None:
        allowed = self._allowed(value, kind, {})
        if allowed is not None:
            return self._seen_keys(value, kind, allowed)
        return self._alibi(value, heads) if kind == "add" else None

    def _seen_keys(self, value: Value, kind: str, allowed: Tensor) -> MaskForm | None:
        """Return the closed form of the keys that a query sees by a term of this kind.

        Args:
            kind: That of the term, or `bias` for a mask to which a bias is added.
            allowed: The term on the small grid, from `_allowed`.
        """
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
            for node in self.outer.region([value], [])
            for operand in node.inputs
            if operand is not None and (constant := self.outer.constant(operand)) is not None
            and constant.dim() >= 2
        ]  # fmt: skip
        if not tables:
            return None
        length = max(GRID_LENGTH, min(max(tables), _LONGEST_TABLE))
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

        for node in self.outer.region([value], []):
            if "." in node.op and base(node.op) in _ARITHMETIC:
                map_leaves(node.attrs["args"], look)
        return sorted(set(found))

    def _allowed(
        self, value: Value, kind: str, numbers: dict[int, int], length: int = GRID_LENGTH
    ) -> Tensor | None:
        """Return which keys are seen, bool [4, S, T]; None where the value is no mask."""
        result = self._evaluate(value, numbers, length)
        if result is None:
            return None
        if kind in ("add", "bias"):
            if result.dtype == torch.bool:
                return None
            blocked = result < _BLOCKED
            if kind == "add" and bool((result[~blocked] != 0).any()):
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
        self, value: Value, numbers: dict[int, int], length: int = GRID_LENGTH
    ) -> Tensor | None:
        mask = padded_masks(length)
        values = {"attention_mask": mask, "position_ids": positions_of(mask)}
        boundary = {self.inputs[n]: v for n, v in values.items() if n in self.inputs}
        if "input_ids" in self.inputs:
            boundary[self.inputs["input_ids"]] = torch.ones_like(mask)
        outer = self.outer
        changed: list[tuple[Node, Any]] = []
        try:
            for node in outer.region([value], []) if numbers else []:
                if "." in node.op and base(node.op) in _ARITHMETIC:
                    changed.append((node, copy.copy(node.attrs["args"])))
                    node.attrs["args"] = map_leaves(
                        node.attrs["args"],
                        lambda leaf: numbers.get(leaf, leaf) if type(leaf) is int else leaf,
                    )
            (result,) = outer.evaluate([value], boundary, {B: 4, S: length, P: 0})
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
        mask = padded_masks(GRID_LENGTH)
        try:
            bias = result.reshape(-1, heads, *result.shape[-2:])
            bias = bias.expand(4, heads, GRID_LENGTH, GRID_LENGTH).double()
        except RuntimeError:
            return None
        positions = positions_of(mask).double()
        # Rows of the unpadded example, keys 0 and 1 of its last query give each slope.
        slopes = bias[0, :, -1, 1] - bias[0, :, -1, 0]
        difference = bias - slopes[None, :, None, None] * positions[:, None, None, :]
        most = 1e-5 * max(1.0, float(slopes.abs().max()))
        for b in range(4):
            keys = mask[b].bool()
            for q in range(GRID_LENGTH):
                seen = keys & (torch.arange(GRID_LENGTH) <= q)
                if not keys[q]:
                    continue
                row = difference[b, :, q][:, seen]
                if not bool((row - row[:, :1]).abs().max() <= most):
                    return None
        if not bool((slopes != 0).any()):
            return None
        # Falcon adds its bias into the mask: one term says both.
        form: MaskForm | None = MaskForm()
        if bool((bias < _BLOCKED).any()):
            allowed = self._allowed(value, "bias", {})
            form = None if allowed is None else self._seen_keys(value, "bias", allowed)
        if form is None:
            return None
        return dataclasses.replace(form, slopes=tuple(float(slope) for slope in slopes))
