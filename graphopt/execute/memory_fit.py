"""What batch, and what length, of a program fits a GPU's memory; nothing is run to find out."""

from __future__ import annotations

import torch

from graphopt.execute.workloads import program_workload
from graphopt.ir.graph import Program
from graphopt.memory.capacity import Fit, largest
from graphopt.memory.predict import HOPPER, Prediction, predict_peak, replay

MOST_ROWS = 2**16
"""The largest batch that is asked for."""

MOST_TOKENS = 2**20
"""The longest sequence that is asked for."""


def predict_step(
    program: Program,
    phase: str,
    *,
    batch: int,
    seq: int,
    dtype: torch.dtype = torch.bfloat16,
    capability: tuple[int, int] = HOPPER,
    limit: int | None = None,
) -> Prediction:
    """Return what a step of a program will take of a GPU's memory.

    Args:
        phase, batch, seq, dtype: See `program_workload`.
        capability, limit: See `predict_peak`.
    """
    return predict_peak(
        lambda device: program_workload(
            program, phase, device, batch=batch, seq=seq, dtype=dtype
        ),
        capability=capability,
        limit=limit,
    )  # fmt: skip


def largest_batch(
    program: Program,
    memory: int,
    *,
    phase: str,
    seq: int,
    dtype: torch.dtype = torch.bfloat16,
    capability: tuple[int, int] = HOPPER,
    most: int = MOST_ROWS,
) -> Fit:
    """Return the largest batch of which a step fits.

    Args:
        memory: Bytes that torch's allocator may reserve on the GPU. The CUDA context, some hundred
            MB, comes on top.
        most: The largest that is asked for.
    """
    return largest(
        lambda batch: predict_step(
            program, phase, batch=batch, seq=seq, dtype=dtype, capability=capability, limit=memory
        ),
        memory,
        most=most,
        serve=lambda trace: replay(trace, capability=capability, limit=memory),
    )


def largest_seq(
    program: Program,
    memory: int,
    *,
    phase: str,
    batch: int,
    dtype: torch.dtype = torch.bfloat16,
    capability: tuple[int, int] = HOPPER,
    most: int = MOST_TOKENS,
) -> Fit:
    """Return the longest sequence of which a step fits; see `largest_batch`."""
    return largest(
        lambda seq: predict_step(
            program, phase, batch=batch, seq=seq, dtype=dtype, capability=capability, limit=memory
        ),
        memory,
        most=most,
        serve=lambda trace: replay(trace, capability=capability, limit=memory),
        degree=2,
    )
