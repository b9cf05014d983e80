"""In which dtype a program is computed."""

from __future__ import annotations

import torch

from graphopt.ir.graph import Program
from graphopt.ir.ops import is_aten


def holds_aten(program: Program) -> bool:
    """Return whether a program holds ops as they were traced: in fp32, with casts that say so."""
    return any(is_aten(node.op) for f in program.functions.values() for node in f.nodes)


def scoring_dtype(program: Program, device: torch.device) -> torch.dtype:
    """Return what activations are computed in where nothing is trained.

    The checkpoint's own 16 bits on a GPU that has them, else fp32.
    """
    own = program.checkpoint_dtype
    if device.type != "cuda" or holds_aten(program):
        return torch.float32
    if own == torch.bfloat16 and torch.cuda.is_bf16_supported(False):
        return own
    return own if own == torch.float16 else torch.float32
