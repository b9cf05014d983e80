"""What torchrun, and what starts ranks as it does, states in the environment; without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from graphopt.errors import UsageError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launched:
    """Which rank of a run this process is.

    Attributes:
        rank, world: Its number, from 0, and how many there are.
        local, local_world: Its number among those on this host, and how many these are.
        address: Where the ranks meet.
    """

    rank: int
    world: int
    local: int
    local_world: int
    address: str


def launched() -> Launched | None:
    """Return the rank that the environment states; None for one process.

    Raises:
        UsageError: What it states cannot be.
    """
    given = {name: os.environ[name] for name in _NAMES if name in os.environ}
    if "RANK" not in given or given.get("WORLD_SIZE", "1") == "1":
        return None
    missing = [name for name in _NAMES if name not in given]
    if missing:
        raise UsageError(
            f"The environment states RANK and WORLD_SIZE, and not {', '.join(missing)}.",
            "Start ranks by torchrun or --ranks, which state them all, or unset RANK.",
        )
    try:
        rank, world, local = (int(given[name]) for name in _NAMES[:3])
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    except ValueError:
        rank = world = local = local_world = -1
    if not (0 <= rank < world and 0 <= local < local_world):
        stated = ", ".join(f"{name}={given[name]!r}" for name in _NAMES[:3])
        raise UsageError(
            f"The environment states {stated}, which is no rank of any run.",
            "Start ranks by torchrun or --ranks, or unset them.",
        )
    address = f"{given['MASTER_ADDR']}:{given['MASTER_PORT']}"
    return Launched(rank, world, local, local_world, address)
