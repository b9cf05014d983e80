"""In which dtype a program is computed, and in which its weights are stored."""

from __future__ import annotations

import torch

from graphopt.ir.graph import Program
from graphopt.ir.ops import is_aten
from graphopt.ir.weights import Cast, Producer, Weight

AUTO = "auto"
"""The name for the dtype that a source holds, or a package computes in."""

STORED_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The dtypes in which trained weights may be asked to be stored, by the name a user gives."""


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


def is_rounded(weight: Weight) -> bool:
    """Return whether a weight may be stored in another dtype: a trained one that is dense.

    Constants keep theirs, since rotary frequencies lose too much in 16 bits, and codes are
    integers.
    """
    return not weight.constant and weight.encoding is None and weight.dtype.is_floating_point


def with_weights_in(program: Program, dtype: torch.dtype) -> Program:
    """Return a program whose trained weights are rounded to a dtype when they are read.

    Args:
        program: Left as it is; no weight is read.
        dtype: A floating-point one.
    """
    rounded = program.copy()
    # Weights that are one tensor stay one.
    casts: dict[int, Producer] = {}
    for weight in program.weights:
        if is_rounded(weight) and weight.dtype != dtype:
            producer = casts.setdefault(
                id(weight.producer), Cast(weight.producer, dtype, weight.name)
            )
            rounded.weights.replace(weight.with_producer(producer))
    rounded.checkpoint_dtype = dtype
    return rounded
