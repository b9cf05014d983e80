"""Counters by which the programs of a launch know which of them is the last to arrive.

The last one has what all others wrote, and does what a second kernel would be launched for. It
leaves its counter at zero for the next launch. Launches that may run at the same time have
counters of their own: those of other streams, and every launch that is recorded in a CUDA graph,
since a graph is replayed on any stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MERGE_AT_ONCE = True
"""Whether spans are merged without a second kernel: `tools/tune_kv_kernels.py` compares both."""

MERGED_ROWS, MERGED_SPANS = 8, 64
"""Of how many rows of a key head, and in how many spans, at most."""

SLAB = 1 << 18
"""Counters that are allocated at a time, 1 MB."""


class Arrivals:
    """Zeros for the launches of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free = torch.zeros(0, dtype=torch.int32, device=device)
        self._of_stream: dict[int, Tensor] = {}

    def counters(self, count: int) -> Tensor | None:
        """Return int32 zeros for a launch that needs so many; None where there are none.

        While a graph is recorded nothing can be set to zero, so that what is there has to suffice.
        """
        if self._device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32, device=self._device)
        if torch.cuda.is_current_stream_capturing():
            return self._taken(count) if count <= len(self._free) else None
        if len(self._free) < max(count, SLAB // 2):
            self._free = torch.zeros(max(count, SLAB), dtype=torch.int32, device=self._device)
            # Of whatever stream: it is there before any launch.
            torch.cuda.current_stream(self._device).synchronize()
        stream = torch.cuda.current_stream(self._device).cuda_stream
        held = self._of_stream.get(stream)
        if held is None or len(held) < count:
            held = self._of_stream[stream] = self._taken(count)
        return held

    def _taken(self, count: int) -> Tensor:
        taken, self._free = self._free[:count], self._free[count:]
        return taken


_arrivals: dict[torch.device, Arrivals] = {}


def counters(device: torch.device, count: int) -> Tensor | None:
    """Return counters at zero for a launch on a device; see `Arrivals.counters`."""
    return _arrivals.setdefault(device, Arrivals(device)).counters(count)


def merging_constants(kernel: Any, rows: int, splits: int, width: int) -> dict[str, Any]:
    """Return the constants with which `attention_decode` merges its spans; none if it cannot.

    One program then reads what all programs of its rows wrote: of few rows that takes less than
    launching a second kernel.
    """
    constants = {
        "ROWS": 1 << (rows - 1).bit_length(),
        "VALUES": 1 << (width - 1).bit_length(),
        "SLOTS": 1 << (splits - 1).bit_length(),
    }
    few = constants["ROWS"] <= MERGED_ROWS and constants["SLOTS"] <= MERGED_SPANS
    return constants if MERGE_AT_ONCE and few and "ARRIVED" in kernel.arg_names else {}
