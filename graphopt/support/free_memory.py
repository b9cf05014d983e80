"""How much memory there is. Imports nothing of graphopt, and is copied into emitted models."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Return how much memory a device has left for torch; 0 where that cannot be known.

    Of a GPU that is what the driver has free and what torch's allocator holds without using it,
    within the part of the GPU that this process may take.
    """
    if device.type == "cuda":
        # The question for the process's share takes no device without an index.
        index = torch.cuda.current_device() if device.index is None else device.index
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        idle = torch.cuda.memory_reserved(device) - used
        allowed = torch.cuda.get_per_process_memory_fraction(index) * total
        return max(0, int(min(free + idle, allowed - used)))
    try:
        # What is in use as a cache of files is free when it is needed.
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, ValueError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
