"""Batches sized by what they are predicted to take of a GPU's memory.

A batch depends on the program, on the length of its windows and on the size of the memory, and not
on what happens to be free: the same device gives the same batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphopt.errors import GraphoptError, PassError, first_line
from graphopt.execute.memory_fit import predict_step
from graphopt.ir.graph import Program
from graphopt.memory.capacity import largest
from graphopt.memory.predict import Prediction
from graphopt.support.quantities import format_bytes

SHARE = 0.9
"""Of the memory, what predictions may fill; the rest is for the driver, and for recorded graphs."""


@dataclass(frozen=True)
class BatchSize:
    """How many windows are taken at once, and why.

    Attributes:
        windows: How many.
        usual: How many it would be with more memory.
        seq: Tokens of each.
        memory: Bytes of the GPU by which it was sized; None where it was not.
        bytes: What they are predicted to take.
        unknown: Why nothing could be predicted; else "".
    """

    windows: int
    usual: int
    seq: int
    memory: int | None = None
    bytes: int = 0
    unknown: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.windows * self.seq

    def describe(self, what: str) -> str:
        """Return a sentence on what is taken at once; "" where nothing was sized."""
        count = f"{self.windows:,} window{'s' * (self.windows != 1)} of {self.seq:,} tokens"
        if self.unknown:
            return f"{what} takes {count}; what that needs is not predicted: {self.unknown}."
        if self.memory is None:
            return ""
        fewer = f" {self.usual:,} would not fit." if self.windows < self.usual else ""
        return (
            f"{what} takes {count}, which is predicted to need {format_bytes(self.bytes)} of "
            f"{format_bytes(self.memory)}.{fewer}"
        )


def memory_of(device: torch.device, given: int | None) -> int | None:
    """Return the bytes of memory that batches are sized by: those given, or all of a GPU's.

    None on a CPU, where batches have a usual size.
    """
    if device.type != "cuda":
        return None
    return given or int(torch.cuda.get_device_properties(device).total_memory)


def sized(
    predict: Callable[[int, int], Prediction],
    usual: int,
    seq: int,
    memory: int | None,
    remedy: str,
) -> BatchSize:
    """Return the usual number of windows, or the largest that fits where that does not.

    Args:
        predict: From a number of windows, and the bytes that torch may reserve, to what is needed.
        usual: As many as there are with memory enough.
        seq: Tokens of a window.
        memory: See `memory_of`; None leaves the usual number.
        remedy: What to do where not even one window fits.

    Raises:
        PassError: Not even one window fits.
    """
    if memory is None:
        return BatchSize(usual, usual, seq)
    limit = int(SHARE * memory)

    def complete(windows: int) -> Prediction:
        found = predict(windows, limit)
        if not found.trace.complete:
            raise GraphoptError(found.trace.notes[0])
        return found

    try:
        found = complete(usual)
        if found.fits:
            return BatchSize(usual, usual, seq, memory, found.reserved)
        fit = largest(complete, limit, most=max(usual - 1, 1))
    except (GraphoptError, RuntimeError) as problem:
        # What depends on values, as the routing of some experts, has no size without them, and
        # some operators of torch know no tensors without values.
        reason = problem.message if isinstance(problem, GraphoptError) else first_line(problem)
        return BatchSize(usual, usual, seq, unknown=reason.rstrip("."))
    if not fit.value:
        short = fit.prediction.short_of
        asked = "" if short is None else f", where it asks for {format_bytes(short.asked)}"
        raise PassError(
            f"One window of {seq:,} tokens is predicted to need more than {SHARE:.0%} of "
            f"{format_bytes(memory)}{asked}.",
            remedy,
        )
    return BatchSize(fit.value, usual, seq, memory, fit.prediction.reserved)


def walk_size(
    program: Program, seq: int, usual_tokens: int, device: torch.device, given: int | None
) -> BatchSize:
    """Return how many windows a walk over a program's blocks takes at once.

    Args:
        usual_tokens: Tokens of a batch with memory enough.
        device: Where blocks are run.
        given: Bytes that the user lets it have; None for all of the device's.

    Raises:
        PassError: Not even one window fits.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)

    def predict(windows: int, limit: int) -> Prediction:
        return predict_step(
            program, "calibrate", batch=windows, seq=seq, capability=capability, limit=limit
        )

    return sized(
        predict, max(1, usual_tokens // seq), seq, memory_of(device, given),
        "Give a lower seqlen, a larger --memory, or --device cpu.",
    )  # fmt: skip
