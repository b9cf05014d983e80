"""The feed-forward parts of blocks that can be divided, and why others cannot."""

from __future__ import annotations

from graphopt.calibration.output_path import OutputPath
from graphopt.execute.hidden_states import BlockStep
from graphopt.ir.blocks import Block, find_blocks, sub_blocks
from graphopt.ir.dataflow import region
from graphopt.ir.feed_forward import FeedForward, feed_forwards
from graphopt.ir.graph import Program, Value


def parts_of(program: Program) -> list[tuple[Block, FeedForward | str]]:
    """Return every block's feed-forward part, or why it has none that can be divided."""
    found: list[tuple[Block, FeedForward | str]] = []
    for block in find_blocks(program):
        function = program.functions[program.calls[block.position].function]
        parts = feed_forwards(function, block.stream)
        if len(parts) != 1:
            reason = f"it adds {len(parts)} feed-forward parts" if parts else "it has none"
            found.append((block, reason))
        else:
            found.append((block, parts[0]))
    return found


def width_of(program: Program, block: Block, part: FeedForward) -> int:
    """Return how many neurons a part has."""
    call = program.calls[block.position]
    slots = program.functions[call.function].slots_by_value()
    up = call.weights[slots[part.up.inputs[1]]]  # type: ignore[index]
    return program.weights[up].shape[0]


def entry_of(block: BlockStep, form: FeedForward) -> Value | None:
    """Return the residual stream in front of a part, where another part of the block makes it."""
    parts = sub_blocks(block.function, block.block.stream)
    places = [number for number, part in enumerate(parts) if part.kind == "ffn"]
    before = parts[places[0] - 1].behind if places and places[0] else None
    if before is None or before.node not in region(block.function, [form.x]):
        return None
    return before


def output_path(program: Program, block: Block, form: FeedForward) -> OutputPath | str:
    """Return the way of a part's output to its block's end, or why it is not reconstructed."""
    function = program.functions[program.calls[block.position].function]
    parts = sub_blocks(function, block.stream)
    for number, part in enumerate(parts):
        path = OutputPath.of(function, part)
        if isinstance(path, str) or path.projection is not form.down:
            continue
        if any(part.node in region(function, [later.term]) for later in parts[number + 1 :]):
            return "another part of its layer computes with its output"
        return path
    return "more than a norm or a factor stands between its down projection and the stream"
