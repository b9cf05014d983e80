"""Pictures as tokens of a text: rows behind those of the table that words are looked up in.

What a tower makes of a picture is a vector for each of its tokens, like a row of the table. With
these rows behind the table's own, ids beyond the vocabulary stand for a picture's tokens, and what
runs a program on windows of ids runs it on pictures too; where positions or masks depend on
pictures, they follow from the ids (`graphopt.ir.picture_inputs`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from graphopt.errors import PassError
from graphopt.ir.graph import Call, Program
from graphopt.ir.layer_config import decoder_config
from graphopt.ir.picture_inputs import drop_picture_inputs, take_picture_inputs
from graphopt.ir.vision import PictureTokens
from graphopt.ir.weights import Producer, Weight

TABLE = "pictures.table"
"""The weight with a program's table and the rows of pictures behind it."""


@dataclass(frozen=True, eq=False)
class _Joined(Producer):
    """The rows of two producers, one behind the other, in the dtype of the first."""

    first: Producer
    second: Producer

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.first.shape[0] + self.second.shape[0], *self.first.shape[1:])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.first.dtype

    def load(self) -> torch.Tensor:
        value = self.first.load()
        return torch.cat((value, self.second.load().to(value.dtype)))


def _lookup(program: Program) -> tuple[Call, str]:
    """Return the call that looks token ids up, and the slot of its table.

    Raises:
        PassError: There is not one.
    """
    found = []
    for call in program.calls:
        function = program.functions[call.function]
        slots = function.slots_by_value()
        ids = {p for p, a in zip(function.params, call.args, strict=True) if a == "input_ids"}
        for node in function.nodes:
            if node.op == "embedding" and node.inputs[0] in ids and node.inputs[1] in slots:
                found.append((call, slots[node.inputs[1]]))
    if len(found) != 1:
        raise PassError(
            f"{program.name} looks its token ids up in {len(found)} tables, and pictures are put "
            "behind the rows of one.",
            "Leave --calib-images out.",
        )
    return found[0]


def table_of(program: Program) -> Weight:
    """Return the table that token ids are looked up in.

    Raises:
        PassError: There is not one, or its rows are packed.
    """
    call, slot = _lookup(program)
    weight: Weight = program.weights[call.weights[slot]]
    if weight.encoding is not None:
        raise PassError(
            f"The rows of {weight.name!r} are packed, and those of pictures are not.",
            "Put the pass that packs them last, or leave --calib-images out.",
        )
    return weight


def with_picture_rows(
    program: Program,
    rows: Producer,
    tokens: PictureTokens | None = None,
    tables: dict[int, Producer] | None = None,
) -> Program:
    """Return a copy whose ids from the number of the table's rows on stand for rows [K, D].

    Args:
        tokens: Where they stand, for a model whose pictures have positions of three axes or are
            seen both ways.
        tables: Tables with these rows that were made before, by the identity of those without;
            what is made is added. So programs of one table have one with rows, too.

    Raises:
        PassError: As for `table_of`.
        UsageError: As for `take_picture_inputs`.
    """
    weight = table_of(program)
    made = program.copy()
    call, slot = _lookup(made)
    tables = {} if tables is None else tables
    joined = tables.setdefault(id(weight.producer), _Joined(weight.producer, rows))
    made.weights.add(Weight(TABLE, joined))
    call.weights[slot] = TABLE
    config = decoder_config(made.config)
    config["vocab_size"] = weight.shape[0] + rows.shape[0]
    if tokens is not None:
        assert made.vision is not None
        made.vision.tokens = tokens
        take_picture_inputs(made)
    return made


def without_picture_rows(program: Program, before: Program) -> Program:
    """Return what a pass made of `with_picture_rows(before)`, with inputs and table of `before`.

    Raises:
        PassError: The pass changed the table.
    """
    call, slot = _lookup(program)
    own, given = table_of(before), program.weights[call.weights[slot]]
    producer = given.producer
    unchanged = isinstance(producer, _Joined) and producer.first is own.producer
    changed = own.name in program.weights and (
        program.weights[own.name].producer is not own.producer
    )
    if given.name != TABLE or not unchanged or changed:
        raise PassError(
            f"The pass changed {own.name!r}, the rows that words are looked up as, which pictures "
            "stand behind while it is calibrated.",
            "Leave --calib-images out, or the pass.",
        )
    made = program.copy()
    call, slot = _lookup(made)
    call.weights[slot] = own.name
    made.weights.remove(TABLE)
    if own.name not in made.weights:
        made.weights.add(replace(own))
    if "vocab_size" in (config := decoder_config(before.config)):
        decoder_config(made.config)["vocab_size"] = config["vocab_size"]
    else:
        decoder_config(made.config).pop("vocab_size", None)
    if made.vision is not None and made.vision.tokens is not None:
        made.vision.tokens = None
        drop_picture_inputs(made)
    return made
