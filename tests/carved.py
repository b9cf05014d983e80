"""Programs whose feed-forward parts are divided at random."""

from __future__ import annotations

import torch

from graphopt.ir.blocks import find_blocks
from graphopt.ir.feed_forward import Split, carve_call, feed_forwards, with_experts
from graphopt.ir.graph import Function, Program
from graphopt.ir.verify import verify


def carved(
    program: Program,
    *splits: Split | None,
    seed: int = 0,
    router: str = "linear",
    padded: int = 0,
) -> Program:
    """Return the program with its neurons divided at random.

    Args:
        splits: One for all blocks, or one for each; None leaves a block as it is.
        padded: Neurons of zeros that are added to each part.
    """
    program = program.copy()
    generator = torch.Generator().manual_seed(seed)
    rewritten_functions: dict[tuple[str, Split], tuple[Function, dict[str, str]]] = {}
    blocks = find_blocks(program)
    for block, split in zip(blocks, splits * (len(blocks) // len(splits)), strict=True):
        if split is None:
            continue
        call = program.calls[block.position]
        function = program.functions[call.function]
        (part,) = feed_forwards(function, block.stream)
        key = (function.name, split)
        if key not in rewritten_functions:
            name = f"{function.name}_experts{len(rewritten_functions)}"
            rewritten_functions[key] = with_experts(function, part, split, name, router=router)
            program.functions[name] = rewritten_functions[key][0]
        rewritten, made = rewritten_functions[key]
        slots = {value: slot for slot, value in function.weights.items()}
        width, size = program.weights[call.weights[slots[part.up.inputs[1]]]].shape
        values = {
            # Scores of about 1, as fitted ones are.
            "router": torch.randn(split.experts, size, generator=generator) / size**0.5,
            "router.bias": torch.randn(split.experts, generator=generator) / 4,
            "router.gate": torch.randn(split.experts, size, generator=generator) / size**0.5,
        }
        order = torch.randperm(width + padded, generator=generator)
        carve_call(program, call, part, rewritten, made, order, split.shared, values)
    program.prune_unused()
    verify(program)
    return program
