"""Lengths at which programs change what they do, and inputs that lie on both sides of each.

A window of 4,096 tokens shows in texts of more, which cost too much to run. What counts is the
order of the lengths and how near they are to each other: programs whose windows, chunks and rings
are all moved by one rule are equal if and only if the given ones are, so they are run with short
ones. The lengths at which rotary frequencies change are counted in positions, which are an input: a
dozen tokens may stand at any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from graphopt.execute.interpreter import complete_inputs
from graphopt.ir.context import context_length, position_table
from graphopt.ir.graph import Call, Function, Node, Param, Program, resolve_attrs
from graphopt.ir.ops.aten import map_leaves
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type

_BY_INDEX = ("window", "chunk", "ring", "page", "page_max")
"""Attributes of an attention that count keys."""

_BY_POSITION = ("by_length", "ntk_frequencies")
"""Ops whose attribute `length` is compared with positions."""

FIRST, APART, TOKENS = 7, 5, 16
"""The shortest length that is run in a long one's place, how far two of them lie apart at most,
and how many tokens a text has at least."""

POSITIONS = 1 << 17
"""Positions that are tried where a program has no last one or a later one."""

_COMPARES = {
    f"aten.{name}"
    for name in (
        "arange.start", "clamp.default", "eq.Scalar", "floor_divide.default", "ge.Scalar",
        "gt.Scalar", "le.Scalar", "lt.Scalar", "ne.Scalar", "remainder.Scalar", "slice.Tensor",
        "sub.Scalar", "sub.Tensor", "tril.default", "triu.default",
    )
}  # fmt: skip
"""ATen operators in which a number may be a number of tokens."""


def _attentions(program: Program) -> Iterator[tuple[Call, Node]]:
    for call in program.calls:
        for node in program.function_of(call).nodes:
            if node.op == "attention":
                yield call, node


def key_lengths(program: Program) -> set[int]:
    """Return the windows, chunks, rings and pages of all attentions."""
    found = {s.layout.ring for s in program.states.values() if s.layout.ring is not None}
    for call, node in _attentions(program):
        attrs = resolve_attrs(node, call)
        found |= {attrs[key] for key in _BY_INDEX if attrs.get(key) is not None}
    return found


def position_lengths(program: Program) -> set[int]:
    """Return the positions at which rotary frequencies change, and that the config names."""
    found = set[int]()
    for call in program.calls:
        for node in program.function_of(call).nodes:
            if node.op in _BY_POSITION:
                found.add(int(resolve_attrs(node, call)["length"]))
    _stated(program.config, found)
    return {length for length in found if 1 < length <= 1 << 31}


def _stated(config: Any, found: set[int]) -> None:
    for key, value in config.items() if isinstance(config, dict) else ():
        if key == "original_max_position_embeddings" and type(value) is int:
            found.add(value)
        _stated(value, found)


def compared_numbers(functions: Iterable[Function]) -> list[tuple[str, int]]:
    """Return ATen nodes that may compare with a number of tokens, and the largest number each."""
    found: list[tuple[str, int]] = []
    for function in functions:
        for node in function.nodes:
            numbers: list[int] = []

            def look(leaf: Any, numbers: list[int] = numbers) -> Any:
                if type(leaf) is int and 1 < leaf < 1 << 31:
                    numbers.append(leaf)
                return leaf

            if node.op in _COMPARES:
                map_leaves([node.attrs.get("args", []), node.attrs.get("kwargs", {})], look)
            if numbers:
                found.append((f"{function.name}: {node.op}", max(numbers)))
    return found


def short_lengths(lengths: Iterable[int]) -> dict[int, int]:
    """Return a short length for each: in the same order, and as far apart where that is near."""
    short: dict[int, int] = {}
    before = (0, 0)
    for length in sorted(set(lengths)):
        step = length - before[0]
        short[length] = before[1] + min(step, APART if short else FIRST)
        before = length, short[length]
    return short


def with_short_lengths(program: Program, short: dict[int, int]) -> Program:
    """Return a copy of a program whose windows, chunks and rings are the `short` ones."""
    result = program.copy()
    for state in result.states.values():
        if state.layout.ring is not None:
            state.layout = replace(state.layout, size=short[state.layout.ring])
    named: set[tuple[int, str]] = set()
    changed: set[int] = set()
    for call, node in _attentions(result):
        for key in _BY_INDEX:
            value = node.attrs.get(key)
            if isinstance(value, Param):
                if (id(call), value.name) not in named and call.attrs[value.name] is not None:
                    call.attrs[value.name] = short[call.attrs[value.name]]
                named.add((id(call), value.name))
            elif value is not None and id(node) not in changed:
                node.attrs[key] = short[value]
        changed.add(id(node))
    for function in result.functions.values():
        for node in function.nodes:
            if "types" in node.attrs:  # such as those of the heads of a ring that ranks have
                node.attrs["types"] = [_short_type(kind, short) for kind in node.attrs["types"]]
    return result


def _short_type(kind: Type, short: dict[int, int]) -> Type:
    """Return the type of a tensor whose rings hold as many keys as the short ones."""

    def held(least: Any) -> Any:
        return sympy.Min(*(short.get(int(n), n) if n.is_Integer else n for n in least.args))

    def is_ring(part: Any) -> bool:
        return isinstance(part, sympy.Min)

    shape = [n.replace(is_ring, held) if isinstance(n, sympy.Expr) else n for n in kind.shape]
    return replace(kind, shape=tuple(shape))


@dataclass(frozen=True)
class Texts:
    """Inputs for comparing two programs.

    Attributes:
        batches: Program inputs: `input_ids`, `attention_mask` and `position_ids`.
        rows: How many rows the tables of tokens have.
        positions: How many positions there are.
    """

    batches: tuple[dict[str, Tensor], ...]
    rows: int
    positions: int


def make_texts(before: Program, after: Program, lengths: Iterable[int], seed: int) -> Texts:
    """Return texts that reach past `lengths` keys and stand at positions around every change.

    The first two batches are the same two rows, of which one is padded on the left: one to run
    whole, one in steps. A batch stands below each position at which something changes, and one
    goes to the last; the last batch is one token.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = max(TOKENS, 2 * max(lengths, default=0) + 3)
    rows = _token_rows(before)
    positions = _last_position(before, after) + 1
    tokens = max(1, min(tokens, positions))

    def ids(batch: int, length: int) -> Tensor:
        return torch.randint(0, rows, (batch, length), generator=generator)

    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, : min(3, tokens - 1)] = 0
    batches = [{"input_ids": ids(2, tokens), "attention_mask": mask}] * 2
    changes = sorted(x for x in position_lengths(before) | position_lengths(after) if x < positions)
    for last in [*(length - 1 for length in changes), positions - 1]:
        places = _spread(last, tokens, changes)
        batches.append({"input_ids": ids(1, len(places)), "position_ids": places[None]})
    batches.append({"input_ids": ids(1, 1)})
    return Texts(tuple(complete_inputs(batch) for batch in batches), rows, positions)


def one_regime(texts: Texts, before: Program, after: Program) -> Texts:
    """Return texts of which every step has the same rotary frequencies.

    Where frequencies depend on the longest text, keys in a cache keep those they were stored
    with: a text that comes to be longer in steps then is another one.
    """
    lengths = [
        int(resolve_attrs(node, call)["length"])
        for program in (before, after)
        for call in program.calls
        for node in program.function_of(call).nodes
        if node.op in _BY_POSITION
    ]
    if not lengths:
        return texts
    batches: list[dict[str, Tensor]] = []
    for batch in texts.batches:
        places = batch["position_ids"]
        last = int(places.max())
        short = places.clamp(max=max(min(lengths) - 1, 0))
        # At one position alone a text has one length in all of its steps.
        same = short if last < len(places[0]) else torch.full_like(places, last)
        batches.append({**batch, "position_ids": same})
    return Texts(tuple(batches), texts.rows, texts.positions)


def _spread(last: int, count: int, changes: Sequence[int]) -> Tensor:
    """Return ascending positions up to `last`: of every magnitude, and around the changes."""
    near = {length + step for length in changes for step in (-1, 0, 1)}
    chosen = {place for place in near if 0 <= place <= last} | {last}
    for part in torch.linspace(0, 1, max(count - len(chosen), 2)).tolist():
        chosen.add(int((last + 1) ** part) - 1)
    return torch.tensor(sorted(chosen))


def _last_position(before: Program, after: Program) -> int:
    lengths = [context_length(program) for program in (before, after)]
    known = [length for length in lengths if length is not None]
    count = min(min(known, default=POSITIONS), POSITIONS)
    changes = position_lengths(before) | position_lengths(after)
    if all(position_table(program) is None for program in (before, after)):
        count = max(count, *(min(length + 8, 1 << 24) for length in changes), 1)
    return max(count - 1, 0)


def _token_rows(program: Program) -> int:
    """Return how many rows the smallest table has that is read by `input_ids`."""
    found: list[int] = []
    for call in program.calls:
        function = program.function_of(call)
        ids = {v for v, arg in zip(function.params, call.args, strict=True) if arg == "input_ids"}
        tables = function.slots_by_value()
        for node in function.nodes:
            if node.op in ("embedding", "aten.embedding.default") and ids & set(node.inputs):
                found += [
                    program.weights[call.weights[tables[value]]].shape[0]
                    for value in node.inputs
                    if value in tables
                ]
    if found:
        return min(found)
    _, carried = infer_program(program)
    return int(carried[program.outputs[0]].shape[-1])
