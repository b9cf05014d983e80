"""The matrices outside of blocks: the table of token embeddings and the output matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Function, Program, Value


@dataclass(frozen=True)
class Tables:
    """Names of weights, None where there is none that can be packed.

    Attributes:
        embedding: The table that token ids are looked up in.
        head: The matrix whose products are the logits.
        reasons: Why there is none, as a clause, by the name of the attribute.
    """

    embedding: str | None
    head: str | None
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def tied(self) -> bool:
        """Whether the two are one weight."""
        return self.embedding is not None and self.embedding == self.head


def find_tables(program: Program) -> Tables:
    """Return the tables of a program: dense matrices that nothing else reads."""
    readers = _readers(program)
    names = {"embedding": _embedding(program), "head": _head(program)}
    reasons: dict[str, str] = {}
    for table, name in names.items():
        if name is None:
            missing = {
                "embedding": "no stored table is looked up by token ids",
                "head": "the logits are not the products of one stored matrix",
            }
            reasons[table] = missing[table]
        elif not readers[name] <= {"linear", "embedding"}:
            reasons[table] = f"{name} is read by something else too"
        elif (encoding := program.weights[name].encoding) is not None:
            reasons[table] = f"{name} is {encoding} already"
    packable = {table: None if table in reasons else name for table, name in names.items()}
    return Tables(packable["embedding"], packable["head"], reasons)


def _readers(program: Program) -> dict[str, set[str]]:
    """Return what reads each weight: "linear", "embedding", or another word for all else."""
    blocks = {block.position for block in find_blocks(program)}
    readers: dict[str, set[str]] = {}
    for position, call in enumerate(program.calls):
        function = program.functions[call.function]
        uses = function.uses()
        for slot, value in function.weights.items():
            for node, index in uses[value]:
                place = node.op if index == 1 and node.op in ("linear", "embedding") else "other"
                place = "block" if position in blocks else place
                readers.setdefault(call.weights[slot], set()).add(place)
    return readers


def _embedding(program: Program) -> str | None:
    for call in program.calls:
        function = program.functions[call.function]
        slots = function.slots_by_value()
        for node in function.nodes:
            if node.op == "embedding" and node.operand(1) in slots:
                ids = node.inputs[0]
                if ids in function.params:
                    if call.args[function.params.index(ids)] == "input_ids":
                        return call.weights[slots[node.inputs[1]]]  # type: ignore[index]
    return None


def _head(program: Program) -> str | None:
    """Return the matrix of the linear nearest to the logits, found from them backwards.

    What stands between, such as a factor or a cap, is passed.
    """
    wanted = program.outputs[0]
    for call in reversed(program.calls):
        if wanted not in call.results:
            continue
        function = program.functions[call.function]
        matrix = _nearest_matrix(function, function.results[call.results.index(wanted)])
        slot = None if matrix is None else function.slots_by_value().get(matrix)
        return None if slot is None else call.weights[slot]
    return None


def _nearest_matrix(function: Function, result: Value) -> Value | None:
    """Return the matrix of the linear from which the fewest operations lead to a result."""
    values: dict[Value, None] = {result: None}
    for value in (queue := list(values)):
        if value.node is None:
            continue
        if value.node.op == "linear":
            return value.node.inputs[1]
        for operand in value.node.inputs:
            if operand is not None and operand not in values:
                values[operand] = None
                queue.append(operand)
    return None
