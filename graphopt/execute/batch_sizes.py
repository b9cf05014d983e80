"""Batches sized by what they are predicted to take of a GPU's memory.

A batch depends on the program, on the length of its windows and on the size of the memory, and not
on what happens to be free: the same device gives the same batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

import torch

from graphopt.errors import GraphoptError, PassError, first_line
from graphopt.execute.memory_fit import predict_step
from graphopt.ir.graph import Program
from graphopt.memory.capacity import largest
from graphopt.memory.predict import Prediction
from graphopt.support.quantities import counted, format_bytes

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
        count = f"{counted(self.windows, 'window')} of {counted(self.seq, 'token')}"
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


Predict = Callable[[int, int, int], Prediction]
"""From windows, the tokens of each, and the bytes that torch may reserve, to what is needed."""

LEAST_TOKENS = 16
"""Tokens of the shortest window that is suggested."""


@overload
def sized(predict: Predict, usual: int, seq: int, memory: int | None, remedy: str) -> BatchSize: ...
@overload
def sized(
    predict: Predict,
    usual: int,
    seq: int,
    memory: int | None,
    remedy: str,
    *,
    most: int | None,
    required: bool,
) -> BatchSize | None: ...
def sized(
    predict: Predict,
    usual: int,
    seq: int,
    memory: int | None,
    remedy: str,
    *,
    most: int | None = None,
    required: bool = True,
) -> BatchSize | None:
    """Return the usual number of windows, or the largest that fits where that does not.

    Args:
        predict: What windows take.
        usual: As many as there are with memory enough.
        seq: Tokens of a window.
        memory: See `memory_of`; None leaves the usual number.
        remedy: What to do where not even one window fits.
        most: As many as there may be where the usual number does not fit.
        required: Whether something has to fit; else None says that nothing does.

    Raises:
        PassError: Not even one window fits; it says which shorter one would.
    """
    if memory is None:
        return BatchSize(usual, usual, seq)
    limit = int(SHARE * memory)

    @functools.cache
    def complete(windows: int, length: int = seq) -> Prediction:
        found = predict(windows, length, limit)
        if not found.trace.complete:
            raise GraphoptError(found.trace.notes[0])
        return found

    try:
        found = complete(usual)
        if found.fits:
            return BatchSize(usual, usual, seq, memory, found.reserved)
        fit = largest(complete, limit, most=most or max(usual - 1, 1))
    except (GraphoptError, RuntimeError) as problem:
        # What depends on values, as the routing of some experts, has no size without them, and
        # some operators of torch know no tensors without values.
        reason = problem.message if isinstance(problem, GraphoptError) else first_line(problem)
        return BatchSize(usual, usual, seq, unknown=reason.rstrip("."))
    if not fit.value and not required:
        return None
    if not fit.value:
        # What a window takes without a limit, and the longest one within it.
        needed = predict(1, seq, 2**50).reserved
        lengths = (seq >> halvings for halvings in range(1, seq.bit_length()))
        shorter = (n for n in lengths if n >= LEAST_TOKENS and complete(1, n).fits)
        length = next(shorter, None)
        fits = "" if length is None else f" One of {length:,} fits (seqlen={length})."
        raise PassError(
            f"One window of {seq:,} tokens is predicted to need {format_bytes(needed)}, more than "
            f"{SHARE:.0%} of {format_bytes(memory)}.{fits}",
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

    def predict(windows: int, length: int, limit: int) -> Prediction:
        return predict_step(
            program, "calibrate", batch=windows, seq=length, capability=capability, limit=limit
        )

    return sized(
        predict, max(1, usual_tokens // seq), seq, memory_of(device, given),
        "Give a lower seqlen, a larger --memory, or --device cpu.",
    )  # fmt: skip
