"""What of a GPU is taken by anything but keys that may lie on its host."""

from __future__ import annotations

import torch

from graphopt.execute.memory_fit import predict_step
from graphopt.ir.graph import Program
from graphopt.ir.ops.attention import ATTENTIONS
from graphopt.ir.shapes import infer_program
from graphopt.plan.spec import HEAD_SIZES

RESERVE = 10**9
"""Bytes of a GPU that are left to the driver, and to what an allocator cannot use."""


def computing(program: Program, batch: int, tokens: int) -> tuple[int, int]:
    """Return the bytes of weights, and of what reading a part of a prompt takes beside them.

    The part's own keys are among the latter, of all layers: they stay until they are written out.
    """
    dtype = torch.float16 if program.checkpoint_dtype == torch.float16 else torch.bfloat16
    found = predict_step(program, "prefill", batch=batch, seq=tokens, dtype=dtype)
    weights = found.categories.get("weight", 0)
    # Parts of attention are merged in fp32: two outputs, their sum and a product.
    merging = 4 * torch.float32.itemsize * batch * tokens * _widest(program)
    return weights, found.allocated - weights + merging


def has_codes(dim: int) -> bool:
    """Return whether kernels read codes of heads of this size, so that caches keep them."""
    return HEAD_SIZES[0] <= dim <= HEAD_SIZES[1] and dim & (dim - 1) == 0


def _widest(program: Program) -> int:
    """Return the most features that all heads of an attention give for a token."""
    return max(
        int(types[node.outputs[0]].shape[1]) * int(types[node.outputs[0]].shape[3])
        for call, types in zip(program.calls, infer_program(program)[0], strict=True)
        for node in program.functions[call.function].nodes
        if node.op in ATTENTIONS
    )
