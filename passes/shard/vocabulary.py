"""The matrices with a row for every token: embeddings of the input, and the head."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from graphopt.ir.graph import Call, Function, In, Node, Program, Value, unique_name
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.elementwise import Unary
from graphopt.ir.ranks import FIRST_ROWS
from graphopt.ir.types import B, S, Type
from graphopt.ir.weights import Array, Dequantised, Padded, Weight


@dataclass
class Vocabulary:
    """What of a program reads tables with a row for every token.

    Attributes:
        slots: By function, the slots of tables whose rows are split.
        padded: Rows of zeros that were put behind tables, by weight.
        whole: Tables that stay whole, with the reason.
    """

    slots: dict[str, list[str]] = field(default_factory=dict)
    padded: dict[str, int] = field(default_factory=dict)
    whole: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Reader:
    """A node that reads a table, through a slot of a call."""

    call: Call
    slot: str
    node: Node


def divide_vocabulary(program: Program, ranks: int) -> Vocabulary:
    """Prepare the tables of a program for being split by rows, in place.

    Look-ups of tokens become `vocab_parallel_embedding`, and rows of zeros are put behind a table
    whose number of rows the ranks do not divide; the logits of those are cut off.
    """
    result = Vocabulary()
    tables: dict[str, list[_Reader]] = {}
    for reader in (*_look_ups(program), *_heads(program)):
        tables.setdefault(reader.call.weights[reader.slot], []).append(reader)
    for name, readers in tables.items():
        weight = program.weights[name]
        reason = _why_not(program, weight, readers, ranks)
        if reason is not None:
            result.whole.append((name, reason))
            continue
        missing = -weight.shape[0] % ranks
        if missing:
            _pad(program, weight, readers, missing)
            result.padded[name] = missing
        rows = (weight.shape[0] + missing) // ranks
        for reader in readers:
            result.slots.setdefault(reader.call.function, []).append(reader.slot)
            if reader.node.op != "linear":
                _look_up_parts(program, reader, weight.shape[0], rows, ranks)
    return result


def _look_ups(program: Program) -> list[_Reader]:
    found: list[_Reader] = []
    for call in program.calls:
        function = program.function_of(call)
        slots = function.slots_by_value()
        ids = {v for v, name in zip(function.params, call.args, strict=True) if name == "input_ids"}
        found += [
            _Reader(call, slots[node.inputs[1]], node)
            for node in function.nodes
            if node.op == "embedding" and node.inputs[0] in ids and node.inputs[1] in slots
            if not node.attrs.get("offset", 0)
        ]
    return found


def _heads(program: Program) -> list[_Reader]:
    """Return the linear that makes the logits, if nothing but numbers and caps is behind it."""
    found: list[_Reader] = []
    for call in program.calls:
        function = program.function_of(call)
        slots = function.slots_by_value()
        for name, result in zip(call.results, function.results, strict=True):
            value: Value | None = result
            while value is not None and value.node is not None and _is_unary(value.node):
                value = value.node.inputs[0]
            node = None if value is None else value.node
            if name in program.outputs and node is not None and node.op == "linear":
                if node.inputs[1] in slots:
                    found.append(_Reader(call, slots[node.inputs[1]], node))
    return found


def _is_unary(node: Node) -> bool:
    return not is_aten(node.op) and isinstance(get_op(node.op), Unary)


def _why_not(program: Program, weight: Weight, readers: list[_Reader], ranks: int) -> str | None:
    """Return why the rows of a table are not split, as a clause."""
    known = {(id(reader.call), reader.slot): reader.node for reader in readers}
    for call in program.calls:
        function = program.function_of(call)
        uses = function.uses()
        for slot, name in call.weights.items():
            if name != weight.name:
                continue
            node = known.get((id(call), slot))
            if any(user is not node for user, _ in uses[function.weights[slot]]):
                return "it is read in another place too"
    if isinstance(weight.producer, Dequantised) and weight.shape[0] % ranks:
        return f"{weight.shape[0]} rows of codes do not divide by {ranks}"
    return None


def _pad(program: Program, weight: Weight, readers: list[_Reader], missing: int) -> None:
    """Put rows of zeros behind a table, and cut off their logits."""
    program.weights.replace(replace(weight, producer=Padded(weight.producer, missing)))
    for reader in readers:
        if reader.node.op != "linear":
            continue
        function = program.function_of(reader.call)
        bias = reader.node.operand(2)
        if bias is not None:
            name = reader.call.weights[function.slots_by_value()[bias]]
            own = program.weights[name]
            program.weights.replace(replace(own, producer=Padded(own.producer, missing)))
        _cut(function, reader.node, weight.shape[0], weight.dtype)


def _cut(function: Function, node: Node, size: int, dtype: torch.dtype) -> None:
    """Let what reads a linear's output read its first entries alone."""
    value = node.output
    kind = Type((B, S, size), dtype)
    attrs = {"args": [In(0), 2, 0, size], "kwargs": {}, "types": [kind]}
    cut = function.add("aten.slice.Tensor", [value], attrs, [f"{value.name}_real"])
    function.nodes.remove(cut)
    function.nodes.insert(function.nodes.index(node) + 1, cut)
    function.replace(value, cut.output)
    cut.inputs = [value]


def _look_up_parts(program: Program, reader: _Reader, vocab: int, rows: int, ranks: int) -> None:
    """Let a look-up in a table of `vocab` rows find what is in a rank's `rows` alone."""
    first_rows = torch.arange(ranks) * rows
    function, name = program.function_of(reader.call), FIRST_ROWS
    if name in program.weights and not torch.equal(program.weights[name].load(), first_rows):
        name = f"{FIRST_ROWS}_{rows}"
    if name not in program.weights:
        program.weights.add(Weight(name, Array(first_rows), constant=True))
    if name not in function.weights:
        taken = function.value_names()
        function.weights[name] = Value(unique_name("first_rows", taken))
    reader.call.weights[name] = name
    reader.node.op = "vocab_parallel_embedding"
    reader.node.inputs = [*reader.node.inputs[:2], function.weights[name]]
    reader.node.attrs = {"vocab": vocab}
