"""From token ids and what pictures became to what a sighted program takes."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.ir.graph import Function, In, Node, Program, Value
from graphopt.ir.sighted import EMBEDS, rows_alone
from graphopt.ir.types import B, P, S, Type
from graphopt.ir.verify import verify

FEATURES = "image_features"
"""What a tower and its projector make of pictures: f32 [rows, D], in the order of the texts."""


def embedder(program: Program) -> Program:
    """Return the program that makes `inputs_embeds` [B, S, D] of token ids and pictures.

    It takes `input_ids` int64 [B, S] and `image_features` f32 [P, D], at least as many rows as
    there are image tokens among the ids.

    Raises:
        UsageError: As `sighted`.
    """
    made = rows_alone(program)
    vision = program.vision
    assert vision is not None
    (call,) = made.calls
    function = made.functions[call.function]
    (rows,), (ids,) = function.results, function.params
    lookup = next(node for node in function.nodes if node.op == "embedding")
    table = made.weights[call.weights[function.slots_by_value()[lookup.inputs[1]]]]  # type: ignore[index]
    width = int(table.shape[1])
    own = _add(
        function, "aten.eq.Scalar", [ids], [vision.image_token], Type((B, S), torch.bool),
        "is_picture", before=lookup,
    )  # fmt: skip
    if vision.image_token >= table.shape[0]:
        # The table has no row for the image token, whose row is not kept anyway.
        lookup.inputs[0] = _add(
            function, "aten.masked_fill.Scalar", [ids, own], [0], Type((B, S), torch.int64),
            "words", before=lookup,
        )  # fmt: skip
    features = Value(FEATURES)
    function.params.append(features)
    call.args.append(FEATURES)
    made.inputs[FEATURES] = Type((P, width), torch.float32)
    column = _add(
        function, "aten.unsqueeze.default", [own], [-1], Type((B, S, 1), torch.bool), "column"
    )
    rows.name = "rows_of_words"
    function.results = [
        _add(
            function, "aten.masked_scatter.default", [rows, column, features], [],
            Type((B, S, width), torch.float32), EMBEDS,
        )
    ]  # fmt: skip
    verify(made)
    return made


def _add(
    function: Function,
    op: str,
    inputs: list[Value],
    literals: list[Any],
    kind: Type,
    name: str,
    before: Node | None = None,
) -> Value:
    """Add an ATen node on tensors followed by literals, and return its result."""
    args = [*map(In, range(len(inputs))), *literals]
    attrs = {"args": args, "kwargs": {}, "types": [kind]}
    return function.add(op, inputs, attrs, [name], before=before).output
