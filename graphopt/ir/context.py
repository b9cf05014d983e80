"""How many tokens a program takes: what its config states, what tables of positions hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.errors import UsageError
from graphopt.ir.graph import Node, Program, resolve_attrs

_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""What configs call it."""

_LAYOUT_OPS = {
    "add",
    "aten.add.Tensor",
    "aten.add.Scalar",
    "aten._to_copy.default",
    "aten.clone.default",
    "aten.expand.default",
    "aten.repeat.default",
    "aten.reshape.default",
    "aten.squeeze.dim",
    "aten.unsqueeze.default",
    "aten.view.default",
}
"""Ops that leave an index by position one, and a table of rows by position one."""

_GATHERS = {
    "embedding": (1, 0),
    "aten.embedding.default": (0, 1),
    "aten.gather.default": (0, 1),
    "aten.index.Tensor": (0, 1),
    "aten.index_select.default": (0, 1),
}
"""For each op the operand that is the table, and the one that is the index of its rows."""


def rotary_parameters(config: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return the rotary parameters of one kind in a config, of all layers or of some."""
    stated = config.get("rope_parameters")
    stated = stated if isinstance(stated, dict) else {}
    found = [stated, *(entries for entries in stated.values() if isinstance(entries, dict))]
    return [entries for entries in found if entries.get("rope_type") == kind]


def rotary_switch(program: Program) -> int | None:
    """Return the tokens of the longest text with LongRoPE's short frequencies.

    Keys that lie in a cache when a text comes to have more keep their rotation, so who generates
    reads the text again there. None where the frequencies of all lengths are the same.
    """
    for call in program.calls:
        for node in program.function_of(call).nodes:
            if node.op == "by_length":
                return int(resolve_attrs(node, call)["length"])
    return None


def stated_length(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a Hugging Face config says the model was made for.

    Dynamic NTK is for texts so much longer than the config says.
    """
    parts: list[Any] = [config, config.get("text_config")]
    for part in parts:
        for key in _KEYS if isinstance(part, Mapping) else ():
            if isinstance(part.get(key), int):
                dynamic = rotary_parameters(part, "dynamic")
                stretch = max((entries.get("factor", 1) for entries in dynamic), default=1)
                return int(part[key] * stretch)
    return None


def position_table(program: Program) -> tuple[str, int] | None:
    """Return the smallest table whose rows are looked up by position, and how many it has for them.

    Learned positions and tables of sines are of this kind; rotary positions are computed, and
    biases by distance have no last one.
    """
    carried = {"position_ids": 0}  # by name, and how far above positions it is
    found: list[tuple[int, str]] = []
    for call in program.calls:
        function = program.functions[call.function]
        arguments = zip(function.params, call.args, strict=True)
        places = {value: carried[arg] for value, arg in arguments if arg in carried}
        tables = {value: call.weights[slot] for slot, value in function.weights.items()}
        for node in function.nodes:
            given = [value for value in node.inputs if value is not None]
            others = [value for value in given if value not in tables]
            moved = node.op in _LAYOUT_OPS and others and places.keys() >= {*others}
            if moved or node.op.startswith("aten.arange."):
                above = max((places[value] for value in others), default=0) + _added(node)
                places.update(dict.fromkeys(node.outputs, above))
            elif node.op in _LAYOUT_OPS and len(given) == 1 and given[0] in tables:
                tables[node.output] = tables[given[0]]
            elif node.op in _GATHERS and len(given) == 2:
                table, index = (given[i] for i in _GATHERS[node.op])
                if index in places and table in tables:
                    offset = node.attrs.get("offset", 0) if node.op == "embedding" else 0
                    rows = next((n for n in program.weights[tables[table]].shape if n != 1), 1)
                    found.append((rows - int(offset) - places[index], tables[table]))
        for value, result in zip(function.results, call.results, strict=True):
            carried.pop(result, None)
            if value in places:
                carried[result] = places[value]
    if not found:
        return None
    rows, name = min(found)
    return name, rows


def _added(node: Node) -> int:
    """Return the number that an addition adds to an index, as OPT's and BART's relatives do."""
    numbers = node.attrs.get("args", []) if node.op.startswith("aten.add.") else []
    return sum(number for number in numbers if isinstance(number, int))


def context_length(program: Program) -> int | None:
    """Return how many tokens a text may have; None where nothing says it.

    That is what the program was compiled for, else what its config states, and never more than
    a table of positions holds.
    """
    length = program.max_length or stated_length(program.config)
    table = position_table(program)
    if table is None:
        return length
    return min(length or table[1], table[1])


def set_max_length(program: Program, length: int) -> None:
    """Let texts of a program have up to `length` tokens.

    Raises:
        UsageError: A table of positions has fewer rows.
    """
    table = position_table(program)
    if table is not None and length > table[1]:
        name, rows = table
        raise UsageError(
            f"{program.name} looks its positions up in {name!r}, which has {rows} of them: texts "
            f"cannot have {length} tokens.",
            f"Give --max-length {rows} or less.",
        )
    program.max_length = length
