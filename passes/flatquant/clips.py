"""Where clips of rounded activations and weights begin: at the share of a range that errs least."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.execute.block_runner import BlockRunner
from graphopt.ir import functional
from graphopt.ir.graph import Node, Value
from graphopt.pass_manager.rounding_statements import ROUNDED
from graphopt.training.affine import BlockTransforms
from graphopt.training.distillation_data import DistillationData

MOST_CLIP = 0.982
"""The largest share of a range that a clip begins with: its logit is then 4."""
CLIPS_TRIED = (*(0.5 + 0.025 * n for n in range(20)), MOST_CLIP)
"""Shares of the range that are tried for a clip."""
CLIP_TOKENS = 4096
"""Tokens on which they are tried, at least one window."""
NUMBERS_AT_ONCE = 2**24
"""Rounded activations that are in memory at once."""


def search_clips(student: BlockRunner, group: BlockTransforms, data: DistillationData) -> None:
    """Let clips begin where rounding weights, and activations of a few windows, errs least.

    Args:
        student: The block, with roundings in it.
        group: Its transforms, whose clips are set.
        data: Its windows.
    """
    group.search_weight_clips(CLIPS_TRIED)
    function = student.program.function_of(student.program.calls[student.first])
    slots = function.slots_by_value()
    readers: dict[Value, list[tuple[Node, list[int]]]] = {}
    for node in function.nodes:
        if node.op != ROUNDED or node.inputs[0] is None:
            continue
        clips = [slots[value] for value in node.inputs[1:] if value is not None]
        # An earlier pass may have left roundings with clips of its own.
        numbers = [group.clip_slots.index(slot) for slot in clips if slot in group.clip_slots]
        if numbers:
            readers.setdefault(node.inputs[0], []).append((node, numbers))

    def observe(value: Value, x: Tensor) -> None:
        for node, numbers in readers.get(value, ()):
            best = _best_clip(x, node.attrs["bits"], node.attrs["symmetric"])
            for number in numbers:
                group.clips[number].fill_(torch.logit(torch.tensor(best)))

    rows = max(1, CLIP_TOKENS // data.ids.shape[1])
    ids, _, entry = data.batch(list(range(min(rows, len(data.ids)))), student.device)
    values = student.window_inputs(ids)
    student.run_range(values, 0, student.embedding)
    if entry is not None:
        values[student.entry] = entry
    first = student.embedding if entry is None else student.first
    for _ in student.run_calls([values], first, student.stop, observe=observe):
        pass


def _best_clip(x: Tensor, bits: int, symmetric: bool) -> float:
    """Return the share of the range of each token at which rounding errs least, on average."""
    rows = x.float().flatten(0, -2)
    power = rows.square().sum(-1).clamp(min=1e-12)

    errors: list[float] = []
    shares = rows.new_tensor(CLIPS_TRIED)[:, None, None]
    # Few launches for a GPU, which is asked once for several shares.
    for clip in shares.split(max(1, NUMBERS_AT_ONCE // rows.numel())):
        made = functional.quantise_dequantise(rows, clip, clip, bits=bits, symmetric=symmetric)
        errors += ((made - rows).square().sum(-1) / power).mean(-1).tolist()
    return CLIPS_TRIED[errors.index(min(errors))]
