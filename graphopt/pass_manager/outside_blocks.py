"""Layers that passes on blocks leave as they are, which they say."""

from __future__ import annotations

from graphopt.ir.blocks import NO_BLOCK, find_blocks, layer_calls
from graphopt.ir.graph import Program
from graphopt.pass_manager.contract import Skip


def outside_blocks(program: Program) -> list[Skip]:
    """Return the layers of a program that are none of its blocks, with the reason.

    Where layers attend to the keys of earlier ones (Gemma 3n and 4), those that give keys are none,
    nor is what comes behind them.
    """
    blocks = {block.position for block in find_blocks(program)}
    positions = [position for position in layer_calls(program) if position not in blocks]
    calls = [program.calls[position] for position in positions]
    return [Skip(call.path or call.function, NO_BLOCK) for call in calls]
