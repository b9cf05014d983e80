"""Distilling on some tokens of a large vocabulary: a step costs no more where it is larger.

A head of V rows maps D hidden features to V logits. Where a few thousand of its rows are kept,
which is many times D, the student's logits on them are right only where its hidden states are, and
with these the other logits. The distributions that are compared are those over the kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.execute.interpreter import Runner
from graphopt.ir.graph import Call, Program, Value
from graphopt.ir.ops import get_op
from graphopt.ir.ops.elementwise import Unary
from graphopt.ir.shapes import infer_program
from graphopt.ir.weights import Array, Weight
from graphopt.support.per_device import PerDevice
from graphopt.support.ranks import here

KEPT = PerDevice(cpu=8192, gpu=32768)
"""Tokens that are kept of a vocabulary of at least twice as many."""
PROBED = PerDevice(cpu=256, gpu=1024)
"""Positions of the text at which the teacher is asked which tokens it expects, of all that there
are: one costs as much as a hundred with the tokens that are kept."""


def vocabulary_size(program: Program) -> int | None:
    """Return how many logits a program gives; None where that depends on the input."""
    shape = infer_program(program)[1][program.outputs[0]].shape
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def tokens_to_compare(
    program: Program, windows: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Return the tokens on which distributions are compared, sorted; None for all of them.

    They are the most frequent ones of the text, up to half, and those that the program expects
    most at a sample of the text's positions.

    Args:
        program: The teacher.
        windows: int64 [N, S], the text.
        dtype: The dtype in which the teacher is run.
    """
    size, kept = vocabulary_size(program), KEPT.on(device)
    if size is None or size < 2 * kept or _head(program) is None:
        return None
    # Ids beyond the vocabulary stand for pictures, which no logit expects.
    frequent = torch.bincount(windows.flatten(), minlength=size)[:size]
    order = frequent.argsort(descending=True, stable=True)
    seen = order[: min(kept // 2, int((frequent > 0).sum()))].to(device)
    runner = Runner(program, dtype, device, keep_weights=False)
    expected = torch.zeros(size, device=device)
    with torch.no_grad():
        for ids in windows[: max(1, PROBED.on(device) // windows.shape[1])].split(1):
            logits = runner.logits({"input_ids": ids.to(device)})
            expected += logits.float().softmax(-1).sum((0, 1))
    expected[seen] = torch.inf
    tokens = expected.topk(kept).indices.sort().values
    # Where two are expected alike, a last bit may decide.
    here().take_from_first([tokens])
    return tokens


def narrow_head(program: Program, tokens: Tensor) -> Program | None:
    """Return a program that gives the logits of some tokens alone.

    It shares the weights of the given one but for the rows of the head.

    Args:
        tokens: int64 [n].

    Returns:
        None where the logits are no projection followed by elementwise functions of a value.
    """
    narrowed = program.copy()
    found = _head(narrowed)
    if found is None:
        return None
    call, slots = found
    for slot in slots:
        weight = narrowed.weights[call.weights[slot]]
        value = weight.load()
        name = f"{weight.name}.kept"
        narrowed.weights.add(Weight(name, Array(value[tokens.to(value.device)])))
        call.weights[slot] = name
    return narrowed


def _head(program: Program) -> tuple[Call, list[str]] | None:
    """Return the call whose projection makes the logits, and the slots of its weight and bias."""
    name = program.outputs[0]
    for call in reversed(program.calls):
        if name not in call.results:
            continue
        function = program.functions[call.function]
        value: Value | None = function.results[call.results.index(name)]
        while value is not None and value.node is not None:
            node = value.node
            if node.op == "linear":
                slots = function.slots_by_value()
                operands = [operand for operand in node.inputs[1:] if operand is not None]
                own = all(operand in slots for operand in operands)
                return (call, [slots[operand] for operand in operands]) if own else None
            if not isinstance(get_op(node.op), Unary) and not node.op.startswith("aten.to."):
                return None
            value = node.inputs[0]
        if value is None or value not in function.params:
            return None
        name = call.args[function.params.index(value)]
    return None
