"""Raising chains of layout ops (views, transposes, slices) by where every element goes.

A chain of layout ops is a map of indices. Running it on the numbers 0, 1, 2, ... gives the
map exactly; comparing that with a few closed forms gives split_heads, merge_heads, transpose_heads,
a choice of features (which becomes a choice of weight rows where a linear made them), or a
repetition of heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from graphopt.capture.rewriting import SMALL_SIZES, NotRaisedError, Raiser, base
from graphopt.capture.slots import Index, SlotSources
from graphopt.ir.graph import In, Node, Value
from graphopt.ir.types import B, Dim, Type, dim
from graphopt.rewrite import equal_node

LAYOUT_OPS = {
    "view", "reshape", "_unsafe_view", "transpose", "permute", "unsqueeze", "squeeze", "expand",
    "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow", "flatten",
    "unflatten", "repeat_interleave", "repeat", "contiguous", "clone", "index", "movedim",
    "swapaxes", "split_heads", "merge_heads", "transpose_heads", "tensor_split", "numpy_T", "mT",
    "index_select", "expand_as", "swapdims",
}  # fmt: skip


@dataclass(frozen=True)
class LayoutChain:
    """The closed form of a chain of layout ops: what is applied to its root, in this order.

    Attributes:
        unmerge: View the root [B*H, ...] as [B, H, ...] first, with this many heads.
        features: Choose these features of the last dimension.
        split: head size for split_heads; `swap` as the op has it.
        merge: merge_heads; `swap` as the op has it.
        swap_only: transpose_heads.
        repeat: Repeat every head this often.
        turn: Transpose the last two dimensions.
        remerge: View the result [B, H, ...] as [B*H, ...].
    """

    unmerge: int | None = None
    features: Index | None = None
    split: int | None = None
    merge: bool = False
    swap: bool = True
    swap_only: bool = False
    repeat: int = 1
    turn: bool = False
    remerge: bool = False


def raise_layout_ops(raiser: Raiser, slots: SlotSources) -> None:
    """Replace every chain of layout ops that has a closed form."""
    uses = raiser.function.uses()
    outside = raiser.function.outside_values()
    for node in list(raiser.function.nodes):
        if base(node.op) not in LAYOUT_OPS:
            continue
        for value in node.outputs:
            ends = value in outside or any(base(u.op) not in LAYOUT_OPS for u, _ in uses[value])
            if ends:
                with contextlib.suppress(NotRaisedError):
                    _raise_chain(raiser, slots, value)
    raiser.sweep()


def root_of(raiser: Raiser, value: Value) -> tuple[Value, int]:
    """Return the value a chain of layout ops starts from, and the chain's length."""
    length = 0
    while value.node is not None and base(value.node.op) in LAYOUT_OPS:
        node = value.node
        if any(raiser.constant(v) is None for v in node.inputs[1:] if v is not None):
            break
        if not node.inputs or node.inputs[0] is None:
            break
        value, length = node.inputs[0], length + 1
    return value, length


def index_map(
    raiser: Raiser, value: Value, root: Value, sizes: Mapping[sympy.Symbol, int]
) -> Tensor:
    """Return, for each element of `value`, which element of `root` it is."""
    shape = raiser.types[root].concrete(sizes)
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    (result,) = raiser.evaluate([value], {root: numbers}, sizes)
    return result.long()


def _raise_chain(raiser: Raiser, slots: SlotSources, value: Value) -> None:
    root, length = root_of(raiser, value)
    if length == 0 or raiser.slot(root) is not None:
        return
    try:
        maps = [index_map(raiser, value, root, sizes) for sizes in SMALL_SIZES]
    except (KeyError, RuntimeError, ValueError, IndexError, TypeError):
        return
    roots = [raiser.types[root].concrete(sizes) for sizes in SMALL_SIZES]
    chains = [
        _closed_form(m, shape, sizes)
        for m, shape, sizes in zip(maps, roots, SMALL_SIZES, strict=True)
    ]
    if chains[0] is None or chains[0] != chains[1]:
        return
    chain = chains[0]
    if chain == LayoutChain():
        if raiser.types[root] == raiser.types[value]:
            raiser.function.replace(value, root)
        return
    if length == 1 and value.node is not None and _already(value.node, chain):
        return
    _build(raiser, slots, value, root, chain)


def _already(node: Node, chain: LayoutChain) -> bool:
    """True where the single node is how `_build` would write the chain."""
    if node.op in ("split_heads", "merge_heads", "transpose_heads"):
        return True
    if chain == LayoutChain(remerge=True) or (
        chain.unmerge and chain == LayoutChain(unmerge=chain.unmerge)
    ):
        return base(node.op) == "reshape"
    if chain == LayoutChain(turn=True):
        return node.op == "aten.transpose.int" and node.attrs["args"][1:] == [-1, -2]
    return chain == LayoutChain(repeat=chain.repeat) and base(node.op) == "repeat_interleave"


def _closed_form(
    where: Tensor, root: tuple[int, ...], sizes: Mapping[sympy.Symbol, int]
) -> LayoutChain | None:
    """Return the closed form of an index map, at one choice of sizes."""
    if where.numel() == 0:
        return None
    batch = sizes[B]
    numbers = torch.arange(torch.Size(root).numel()).reshape(root)
    starts: list[tuple[int | None, Tensor]] = [(None, numbers)]
    if len(root) == 3 and root[0] % batch == 0 and root[0] != batch:
        heads = root[0] // batch
        starts.append((heads, numbers.reshape(batch, heads, *root[1:])))
    for unmerge, start in starts:
        for remerge in (False, True):
            if remerge and (where.dim() != 3 or where.shape[0] % batch):
                continue
            target = where
            if remerge:
                target = where.reshape(batch, where.shape[0] // batch, *where.shape[1:])
            for turn in (False, True):
                if turn and target.dim() < 3:
                    continue
                aim = target.transpose(-1, -2) if turn else target
                chain = _core(start, aim)
                if chain is not None:
                    return LayoutChain(unmerge, *chain, turn, remerge)
    return None


_Core = tuple[Index | None, int | None, bool, bool, bool, int]


def _core(start: Tensor, aim: Tensor) -> _Core | None:
    """Match features, split, merge, swap, swap_only and repeat; None where nothing fits."""
    if start.shape == aim.shape and torch.equal(start, aim):
        return (None, None, False, True, False, 1)
    if start.dim() == 3:
        return _from_features(start, aim)
    if start.dim() != 4:
        return None
    for swap in (True, False):
        merged = (start.transpose(1, 2) if swap else start).flatten(2)
        if merged.shape == aim.shape and torch.equal(merged, aim):
            return (None, None, True, swap, False, 1)
    for swapped in (False, True):
        heads = start.transpose(1, 2) if swapped else start
        if heads.shape == aim.shape and torch.equal(heads, aim):
            return (None, None, False, True, swapped, 1)
        if aim.dim() == 4 and aim.shape[1] > heads.shape[1] and aim.shape[1] % heads.shape[1] == 0:
            repeat = aim.shape[1] // heads.shape[1]
            if torch.equal(heads.repeat_interleave(repeat, 1), aim):
                return (None, None, False, True, swapped, repeat)
    return None


def _from_features(start: Tensor, aim: Tensor) -> _Core | None:
    """Match choices of features of [B, S, N], in one row or split into heads."""
    batch, sequence, width = start.shape
    if aim.dim() == 3 and aim.shape[:2] == start.shape[:2]:
        chosen = aim[0, 0]
        if torch.equal(start[..., chosen % width], aim):
            return (_as_index(chosen, width), None, False, True, False, 1)
        return None
    if aim.dim() != 4 or aim.shape[0] != batch:
        return None
    for swap in (True, False):
        heads_first = aim if swap else aim.transpose(1, 2)
        if heads_first.shape[2] != sequence:
            continue
        chosen = heads_first[0, :, 0, :]
        rebuilt = start[..., chosen.flatten() % width].unflatten(-1, chosen.shape)
        if not torch.equal(rebuilt.transpose(1, 2), heads_first):
            continue
        repeat = _repeats(chosen)
        if repeat > 1 and not swap:
            return None
        unique = chosen[::repeat].flatten()
        return (_as_index(unique, width), chosen.shape[1], False, swap, False, repeat)
    return None


def _repeats(chosen: Tensor) -> int:
    """Return how often each head stands in a row, [H, D] features."""
    heads = chosen.shape[0]
    for repeat in range(heads, 1, -1):
        if heads % repeat == 0:
            first = chosen[::repeat]
            if torch.equal(first.repeat_interleave(repeat, 0), chosen):
                return repeat
    return 1


def _as_index(chosen: Tensor, width: int) -> Index | None:
    """Return None for all features in order, a slice where the step is even, else the list."""
    items = chosen.tolist()
    if items == list(range(width)):
        return None
    step = items[1] - items[0] if len(items) > 1 else 1
    if step > 0 and items == list(range(items[0], items[-1] + 1, step)):
        return slice(items[0], items[-1] + 1, step)
    return tuple(items)


def _build(
    raiser: Raiser, slots: SlotSources, value: Value, root: Value, chain: LayoutChain
) -> None:
    """Write the chain as nodes in front of the chain's last node."""
    before = value.node
    assert before is not None
    current = root
    if chain.features is not None:
        chosen = _choose_features(raiser, slots, root, chain.features)
        if chosen is None:
            return
        current = chosen
    if chain.unmerge is not None:
        first, *rest = raiser.types[current].shape
        shape = (dim(first / sympy.Integer(chain.unmerge)), chain.unmerge, *rest)
        current = _reshape(raiser, current, shape, before)
    if chain.split is not None:
        attrs: dict[str, Any] = {"head_dim": chain.split}
        if not chain.swap:
            attrs["swap"] = False
        current = raiser.insert("split_heads", [current], attrs, before).output
    if chain.merge:
        attrs = {} if chain.swap else {"swap": False}
        current = raiser.insert("merge_heads", [current], attrs, before).output
    if chain.swap_only:
        current = raiser.insert("transpose_heads", [current], {}, before).output
    if chain.repeat > 1:
        batch, heads, *rest = raiser.types[current].shape
        kind = Type((batch, dim(heads * chain.repeat), *rest), raiser.types[current].dtype)
        current = _aten(raiser, "aten.repeat_interleave.self_int", current,
                        [In(0), chain.repeat, 1], kind, before)  # fmt: skip
    if chain.turn:
        *rest, a, b = raiser.types[current].shape
        kind = Type((*rest, b, a), raiser.types[current].dtype)
        current = _aten(raiser, "aten.transpose.int", current, [In(0), -1, -2], kind, before)
    if chain.remerge:
        batch, heads, *rest = raiser.types[current].shape
        current = _reshape(raiser, current, (dim(batch * heads), *rest), before)
    raiser.function.replace(value, current)


def _reshape(raiser: Raiser, x: Value, shape: tuple[Dim, ...], before: Node) -> Value:
    kind = Type(shape, raiser.types[x].dtype)
    return _aten(raiser, "aten.reshape.default", x, [In(0), list(shape)], kind, before)


def _aten(raiser: Raiser, op: str, x: Value, args: list[Any], kind: Type, before: Node) -> Value:
    attrs = {"args": args, "kwargs": {}, "types": [kind]}
    node = raiser.function.add(op, [x], attrs, before=before)
    raiser.types[node.output] = kind
    return node.output


def _choose_features(
    raiser: Raiser, slots: SlotSources, root: Value, features: Index
) -> Value | None:
    """Return the chosen features of `root`: a linear with those rows, or a slice."""
    made = root.node
    if made is not None and made.op == "linear" and all(
        v is None or raiser.is_weight(v) for v in made.inputs[1:]
    ):  # fmt: skip
        operands = [made.inputs[0]]
        for operand in made.inputs[1:]:
            if operand is not None:
                operands.append(slots.rows(raiser, operand, features))
        equal = equal_node(raiser.function, "linear", operands, {})
        return equal.output if equal else raiser.insert("linear", operands, {}, made).output
    if isinstance(features, slice) and features.step == 1 and made is not None:
        *rest, _ = raiser.types[root].shape
        kind = Type((*rest, features.stop - features.start), raiser.types[root].dtype)
        args = [In(0), -1, features.start, features.stop]
        after = raiser.function.nodes[raiser.function.nodes.index(made) + 1]
        return _aten(raiser, "aten.slice.Tensor", root, args, kind, after)
    return None
