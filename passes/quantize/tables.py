"""The matrices outside of blocks: the table of token embeddings and the output matrix."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Program


@dataclass(frozen=True)
class Tables:
    """Names of weights, None where there is none that can be packed.

    Attributes:
        embedding: The table that token ids are looked up in.
        head: The matrix whose products are the logits.
    """

    embedding: str | None
    head: str | None

    @property
    def tied(self) -> bool:
        """Whether the two are one weight."""
        return self.embedding is not None and self.embedding == self.head


def find_tables(program: Program) -> Tables:
    """Return the tables of a program: dense matrices that nothing else reads."""
    blocks = {block.position for block in find_blocks(program)}
    readers: dict[str, set[str]] = {}
    embedding: str | None = None
    head: str | None = None
    for position, call in enumerate(program.calls):
        function = program.functions[call.function]
        uses = function.uses()
        for slot, value in function.weights.items():
            name = call.weights[slot]
            for node, index in uses[value]:
                place = node.op if index == 1 and node.op in ("linear", "embedding") else "other"
                if position in blocks:
                    place = "block"
                readers.setdefault(name, set()).add(place)
                ids = node.inputs[0]
                if place == "embedding" and ids in function.params:
                    if call.args[function.params.index(ids)] == "input_ids":
                        embedding = name
                if place == "linear" and program.outputs[0] in call.results:
                    head = name
    named = [
        name
        if name is not None
        and readers[name] <= {"linear", "embedding"}
        and program.weights[name].encoding is None
        else None
        for name in (embedding, head)
    ]
    return Tables(*named)
