"""From the decoder on text alone to the one that takes pictures: embeddings in place of ids.

`with_rows_apart` is still the decoder on text, in which the rows that ids are looked up as are a
value of their own; `rows_alone` is what makes them, and `sighted` is the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from graphopt.errors import UsageError
from graphopt.ir.dead_code import remove_dead
from graphopt.ir.graph import (
    Call,
    Function,
    Node,
    Param,
    Program,
    Value,
    resolve_attrs,
    unique_name,
)
from graphopt.ir.ops.attention import ATTENTIONS, BIAS
from graphopt.ir.ops.pictures import AXES
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import B, P, S, Type
from graphopt.ir.verify import verify
from graphopt.ir.vision import Sections, Vision

EMBEDS, PICTURES = "inputs_embeds", "pictures"
"""What a sighted program takes beside ids, mask and positions: the embeddings of the tokens
f32 [B, S, D], pictures and text alike; and, where tokens of a picture see each other both ways,
which picture each token belongs to, int64 [B, P + S], negative for none."""


def sighted(program: Program) -> Program:
    """Return the program that takes `inputs_embeds` in the place of what ids are looked up as.

    It has the weights of `program`, and the passes that ran are in it. `input_ids` stay an input
    that says how many tokens there are and which they are. Positions [3, B, S] are in time, height
    and width where the model has three axes.

    Raises:
        UsageError: The model takes no pictures, or a pass has left something in the decoder that
            has no form with them.
    """
    vision = _vision(program)
    made = with_rows_apart(program)
    # What made the rows goes, and they are given.
    made.calls = [call for call in made.calls if call.results != [EMBEDS]]
    made.inputs[EMBEDS] = Type((B, S, rows_width(program)), torch.float32)
    if vision.sections is not None:
        made.inputs["position_ids"] = Type((AXES, B, S), torch.int64)
    if vision.both_ways:
        _see_both_ways(made)
    made.prune_unused()
    verify(made)
    return made


def with_rows_apart(program: Program) -> Program:
    """Return the program on token ids whose first call makes `inputs_embeds` of them, and no more.

    It computes what `program` does, and everything behind the first call takes embeddings of
    pictures in the place of rows. Rotary tables take positions of three axes where the model has
    them, and [B, S] as well.

    Raises:
        UsageError: As `sighted`.
    """
    vision = _vision(program)
    made = program.copy()
    _part_rows(made, vision)
    if vision.sections is not None:
        take_axes(made, vision.sections)
        made.inputs["position_ids"] = program.inputs["position_ids"]  # [B, S] goes as well
    made.prune_unused()
    verify(made)
    return made


def rows_alone(program: Program) -> Program:
    """Return the program that makes `inputs_embeds` [B, S, D] of `input_ids` [B, S], and no more.

    Raises:
        UsageError: As `sighted`.
    """
    made = with_rows_apart(program)
    made.calls, made.outputs = made.calls[:1], [EMBEDS]
    made.inputs = {"input_ids": made.inputs["input_ids"]}
    made.states = {}
    made.prune_unused()
    verify(made)
    return made


def rows_width(program: Program) -> int:
    """Return D, the features of an embedding.

    Raises:
        UsageError: As `sighted`.
    """
    call, _, node = _lookup(program)
    kinds, _ = infer_program(program)
    return int(kinds[program.calls.index(call)][node.output].shape[-1])


def _vision(program: Program) -> Vision:
    if program.vision is None:
        raise UsageError(
            f"{program.name} is a model of text alone and takes no pictures.",
            "Give a vision-language model, as a checkpoint folder with vision_config.",
        )
    return program.vision


def _refused(program: Program, what: str) -> UsageError:
    return UsageError(
        f"{program.name} with pictures: {what}.",
        "Use it on text alone, or leave out the pass that made it so.",
    )


def _readers(program: Program, name: str) -> Iterator[tuple[Call, Function, Node]]:
    """Yield what reads a program input, with the call that does."""
    for call in program.calls:
        function = program.functions[call.function]
        own = {p for p, arg in zip(function.params, call.args, strict=True) if arg == name}
        for node in function.nodes:
            if own.intersection(value for value in node.inputs if value is not None):
                yield call, function, node


def _lookup(program: Program) -> tuple[Call, Function, Node]:
    """Return what looks token ids up, with the call that does."""
    readers = list(_readers(program, "input_ids"))
    if [node.op for _, _, node in readers] != ["embedding"]:
        ops = ", ".join(node.op for _, _, node in readers) or "nothing"
        raise _refused(program, f"its token ids are read by {ops}, not by one embedding")
    return readers[0]


def _part_rows(program: Program, vision: Vision) -> None:
    """Move the look-up of token ids, and the factor behind it, to a first call of their own."""
    call, function, node = _lookup(program)
    rows = Function(unique_name("token_rows", set(program.functions)))
    ids, table = Value("input_ids"), node.inputs[1]
    assert table is not None
    slot = next(slot for slot, value in function.weights.items() if value is table)
    rows.params, rows.weights = [ids], {slot: Value(table.name)}
    attrs = resolve_attrs(node, call)
    made = rows.add("embedding", [ids, rows.weights[slot]], attrs, [EMBEDS])
    cut = node.output
    # Where a pass has put the factor into the table, the rows are as wide as a picture's.
    for other in function.nodes if vision.embedding_scale != 1.0 else ():
        if other.op == "scale" and other.inputs[0] is node.output:
            factor = resolve_attrs(other, call)["factor"]
            if math.isclose(factor, vision.embedding_scale, rel_tol=1e-5):
                made.outputs[0].name = "rows"
                made = rows.add("scale", [made.output], {"factor": factor}, [EMBEDS])
                cut = other.output
                break
    rows.results = [made.output]
    given = Value(EMBEDS)
    function.params.append(given)
    call.args.append(EMBEDS)
    function.replace(cut, given)
    remove_dead(function)
    for value, name in list(zip(function.params, call.args, strict=True)):
        if name == "input_ids" and not any(value in other.inputs for other in function.nodes):
            place = function.params.index(value)
            del function.params[place], call.args[place]
    first = Call(rows.name, ["input_ids"], [EMBEDS], {slot: call.weights[slot]})
    program.functions[rows.name] = rows
    program.calls.insert(0, first)


def take_axes(program: Program, sections: Sections) -> None:
    """Give every rotary table positions of three axes, in place; see `Vision.sections`.

    Raises:
        UsageError: Something else reads positions.
    """
    names = dict(zip(("time", "height", "width"), sections, strict=True))
    for _, _, node in _readers(program, "position_ids"):
        if node.op != "rope_table":
            raise _refused(program, f"{node.op} reads positions, which have three axes")
        node.op, node.attrs = "axial_rope_table", node.attrs | names
    program.inputs["position_ids"] = Type((AXES, B, S), torch.int64)


def _see_both_ways(program: Program) -> None:
    """Give every attention a mask by which the tokens of one picture see each other."""
    masks: dict[int | None, str] = {}
    for name in list(dict.fromkeys(call.function for call in program.calls)):
        function = program.functions[name]
        calls = [call for call in program.calls if call.function == name]
        for node in [node for node in function.nodes if node.op in ATTENTIONS]:
            _give_mask(program, function, node, calls, masks)
        mentioned = {
            value.name
            for node in function.nodes
            for value in node.attrs.values()
            if isinstance(value, Param)
        }
        for call in calls:
            call.attrs = {key: value for key, value in call.attrs.items() if key in mentioned}
    function = Function(unique_name("picture_masks", set(program.functions)))
    pictures, tokens = Value("pictures"), Value("tokens")
    function.params = [pictures, tokens]
    for window, name in masks.items():
        node = function.add("picture_mask", [pictures, tokens], {"window": window}, [name])
        function.results.append(node.output)
    program.functions[function.name] = function
    program.inputs[PICTURES] = Type((B, P + S if program.states else S), torch.int64)
    first = Call(function.name, [PICTURES, "input_ids"], list(masks.values()))
    program.calls.insert(0, first)


def _give_mask(
    program: Program,
    function: Function,
    node: Node,
    calls: list[Call],
    masks: dict[int | None, str],
) -> None:
    """Make an attention of all calls see what its mask says; add the masks that it needs."""
    param = Value(unique_name("picture_mask", function.value_names()))
    for call in calls:
        check_both_ways(program, call, node)
        window = resolve_attrs(node, call).get("window")
        call.args.append(masks.setdefault(window, f"picture_mask_{len(masks)}"))
    function.params.append(param)
    give_bias(node, param)


def check_both_ways(program: Program, call: Call, node: Node) -> None:
    """Refuse an attention that has no form in which a mask says all that is seen.

    Raises:
        UsageError: It is another op than `attention`, not causal, has a bias, or counts tokens.
    """
    attrs = resolve_attrs(node, call)
    odd = [key for key in ("chunk", "ring", "selected_blocks") if attrs.get(key)]
    if node.op != "attention" or odd or not attrs["causal"] or node.operand(BIAS) is not None:
        what = f"an attention with {odd[0]}" if odd else f"its {node.op}"
        raise _refused(
            program,
            f"{call.path or call.function}: {what} has no form in which the tokens of a "
            "picture see each other both ways",
        )


def give_bias(node: Node, mask: Value) -> None:
    """Make an attention see what a mask says, its own window in it, and nothing else."""
    while len(node.inputs) <= BIAS:
        node.inputs.append(None)
    node.inputs[BIAS] = mask
    node.attrs |= {"causal": False, "window": None}
