"""Where to compute."""

from __future__ import annotations

import torch

from graphopt.errors import GraphoptError, UsageError


def usable_device(name: str | torch.device) -> torch.device:
    """Return the device called `name`, checked by putting a number there.

    Args:
        name: Such as `cpu`, `cuda` or `cuda:1`.

    Raises:
        UsageError: torch knows no such name.
        GraphoptError: There is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"Unknown device {str(name)!r}.", "Known: cpu, cuda, cuda:N.") from None
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise GraphoptError(
            f"The device {str(name)!r} cannot be used here: {reason}.", "Leave --device out."
        ) from error
    return device
