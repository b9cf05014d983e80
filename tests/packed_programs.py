"""Programs whose weights are packed, made of dense ones by rounding to the nearest codes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphopt.ir import Array, Dequantised, Packed, Program, Weight
from graphopt.ir.verify import verify


def packed_weight(weight: Weight, encoding: Packed) -> Weight:
    tensors = encoding.quantise(weight.load(), torch.float32)
    producer = Dequantised(encoding, **{s: Array(t) for s, t in tensors.items()})
    return Weight(weight.name, producer, weight.checkpoint)


def with_packed(program: Program, choose: Callable[[str], Packed | None]) -> Program:
    """Return a copy in which weights are packed as `choose(name)` says, None for dense."""
    result = program.copy()
    for weight in program.weights:
        encoding = choose(weight.name)
        if encoding is not None:
            result.weights.replace(packed_weight(weight, encoding))
    verify(result)
    return result


def projections(encoding: Packed) -> Callable[[str], Packed | None]:
    """Return the choice of all projections and the embedding."""
    return lambda name: encoding if name.endswith(("_proj.weight", "embed.weight")) else None
