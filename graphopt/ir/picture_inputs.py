"""Programs on windows of ids in which pictures have positions of three axes, or are seen both ways.

What a program with pictures takes beside ids (`graphopt.ir.sighted`) follows from the ids where
each token of a picture has one of its own: `Vision.tokens` says how, and a `Runner` makes it. Masks
are made inside the function that attends by them: a mask of every window of a text would take more
memory than the text's hidden states. So all of it can be taken back after a pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.graph import Function, Program, Value, unique_name
from graphopt.ir.ops.attention import ATTENTIONS, BIAS
from graphopt.ir.sighted import PICTURES, check_both_ways, give_bias, take_axes
from graphopt.ir.types import B, P, S, Type
from graphopt.ir.vision import Vision

_AXES = ("time", "height", "width")


def picture_inputs(vision: Vision | None, ids: Tensor, past: int = 0) -> dict[str, Tensor]:
    """Return the inputs that pictures among ids make others than those of text.

    Args:
        ids: int64 [B, P + S], without padding.
        past: How many of them, P, a cache holds.

    Returns:
        `position_ids` [3, B, S] and `pictures` [B, P + S], those of them that the program takes.
    """
    if vision is None or vision.tokens is None:
        return {}
    made = {}
    if vision.sections is not None:
        made["position_ids"] = vision.tokens.positions(ids)[..., past:]
    if vision.both_ways:
        made[PICTURES] = vision.tokens.numbers(ids)
    return made


def take_picture_inputs(program: Program) -> None:
    """Make a program take `picture_inputs`, in place.

    Raises:
        UsageError: A pass has left something in the decoder that has no form with pictures.
    """
    vision = program.vision
    assert vision is not None and vision.tokens is not None
    if vision.sections is not None:
        take_axes(program, vision.sections)
    if not vision.both_ways:
        return
    for call in program.calls:
        for node in program.function_of(call).nodes:
            if node.op in ATTENTIONS:
                check_both_ways(program, call, node)
    for name, function in program.functions.items():
        if _see_both_ways(function):
            for call in program.calls:
                if call.function == name:
                    call.args += [PICTURES, "input_ids"]
    program.inputs[PICTURES] = Type((B, P + S if program.states else S), torch.int64)


def _see_both_ways(function: Function) -> bool:
    """Give every attention of a function a mask; return whether there is one."""
    attentions = [node for node in function.nodes if node.op in ATTENTIONS]
    if not attentions:
        return False
    pictures, tokens = (
        Value(unique_name(name, function.value_names())) for name in (PICTURES, "tokens")
    )
    function.params += [pictures, tokens]
    for node in attentions:
        window = {"window": node.attrs.get("window")}
        mask = function.add("picture_mask", [pictures, tokens], window, before=node)
        give_bias(node, mask.output)
    return True


def drop_picture_inputs(program: Program) -> None:
    """Make a program again one of text alone, in place: the reverse of `take_picture_inputs`."""
    for function in program.functions.values():
        for node in function.nodes:
            if node.op == "axial_rope_table":
                node.op = "rope_table"
                node.attrs = {k: v for k, v in node.attrs.items() if k not in _AXES}
            mask = node.operand(BIAS) if node.op in ATTENTIONS else None
            if mask is not None and mask.node is not None and mask.node.op == "picture_mask":
                node.attrs |= {"causal": True, "window": mask.node.attrs["window"]}
                node.inputs[BIAS] = None
                while node.inputs[-1] is None:
                    node.inputs.pop()
        read = {value for node in function.nodes for value in node.inputs}
        function.nodes = [
            node for node in function.nodes if node.op != "picture_mask" or node.output in read
        ]
    if "position_ids" in program.inputs:
        program.inputs["position_ids"] = Type((B, S), torch.int64)
    if program.inputs.pop(PICTURES, None) is None:
        return
    for name, function in program.functions.items():
        calls = [call for call in program.calls if call.function == name]
        if not any(PICTURES in call.args for call in calls):
            continue
        read = {value for node in function.nodes for value in node.inputs}
        for place in reversed(range(len(function.params))):
            given = {call.args[place] for call in calls}
            if given <= {PICTURES, "input_ids"} and function.params[place] not in read:
                del function.params[place]
                for call in calls:
                    del call.args[place]
