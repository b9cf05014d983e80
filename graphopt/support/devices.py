"""Where to compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from graphopt.errors import GraphoptError, PassError, UsageError
from graphopt.support import free_memory
from graphopt.support.boundary import out_of_memory
from graphopt.support.launched import launched

AUTO = "auto"
"""In place of a device's name: the one on which what is run is fastest."""


def found_gpu() -> torch.device | None:
    """Return the GPU that is used where nobody names a device; None where there is none."""
    return torch.device("cuda") if torch.cuda.is_available() else None


def free_bytes(device: torch.device) -> int:
    """Return how much memory a device has left for this process; 0 where that cannot be known.

    Ranks of one host share its memory, and take about as much each.
    """
    free = free_memory.free_bytes(device)
    found = launched() if device.type == "cpu" else None
    return free if found is None else free // found.local_world


def describe_device(device: torch.device) -> str:
    """Return what a device is called in a sentence."""
    if device.type == "cpu":
        return "the CPU"
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def usable_device(name: str | torch.device, known: str = "auto, cpu, cuda, cuda:N") -> torch.device:
    """Return the device called `name`, checked by putting a number there and reading it.

    Args:
        name: Such as `cpu`, `cuda` or `cuda:1`.
        known: The names to give, for the message.

    Raises:
        UsageError: torch knows no such name.
        GraphoptError: There is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"Unknown device {str(name)!r}.", f"Known: {known}.") from None
    try:
        float(torch.zeros(1, device=device))  # from a device without memory none can be read
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        remedy = "Leave --device out."
        if device.type == "cuda" and not torch.backends.cuda.is_built():
            reason = f"torch {torch.__version__} was built without CUDA"
            remedy = "Leave --device out, or install a torch with CUDA (docs/install.md)."
        raise GraphoptError(
            f"The device {str(name)!r} cannot be used here: {reason}.", remedy
        ) from error
    return device


def room_for(size: int, device: torch.device) -> torch.device | None:
    """Return where `size` bytes take no more than half of what is free.

    That is the device or else the host; None where neither has so much.
    """
    for place in (device, torch.device("cpu")):
        if size <= free_bytes(place) // 2:
            return place
    return None


@contextmanager
def must_fit(device: torch.device, what: str, remedy: str) -> Iterator[None]:
    """Say what lowers the need where memory does not suffice in the body.

    Raises:
        PassError: The device, or the host, has too little.
    """
    try:
        yield
    except Exception as error:
        short_of = out_of_memory(error)
        if short_of is None:
            raise
        place = device if short_of == "the GPU" else short_of
        raise PassError(f"{what} does not fit the memory of {place}.", remedy) from error
