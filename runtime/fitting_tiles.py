"""Tiles of Triton kernels that the GPU at hand has the memory for."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

import torch

Constants = Mapping[str, int | float | bool]


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


LEAST = 16
"""Rows and keys of the smallest tile: a matrix unit multiplies 16 at a time."""


def without_wgmma(constants: Constants) -> Constants:
    """Return tiles that Triton does not multiply by Hopper's `wgmma`: 64 rows of four warps.

    Its assembler mistakes an address in kernels with as many products as these (see
    `graphopt.plan.triton`). Plans for Hopper have such tiles; those for Ampere get them on
    Hopper, with as many rows a warp.
    """
    rows, warps = int(constants["BLOCK_M"]), int(constants["num_warps"])
    if rows % 64 or warps % 4:
        return constants
    return {**constants, "BLOCK_M": max(LEAST, 2 * rows // warps), "num_warps": 2}


def _compiles_for_hopper(device: torch.device) -> bool:
    """Return whether Triton compiles for sm_90 here."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return os.environ.get("TRITON_OVERRIDE_ARCH", "sm90").startswith("sm90")


def smaller(constants: Constants) -> Iterator[Constants]:
    """Yield constants of a Triton kernel, then of ever smaller tiles for a GPU with less memory.

    What a tile takes of the shared memory hangs on the compiler's version as well, and a GPU
    other than the plan's may have less of it. First fewer tiles are on their way at a time, then
    they have fewer keys, then fewer rows. A row's result is the same but for its rounding.
    """
    tiles = {name: int(constants[name]) for name in ("num_stages", "BLOCK_N", "BLOCK_M")}
    yield constants
    for name, least in (("num_stages", 1), ("BLOCK_N", LEAST), ("BLOCK_M", LEAST)):
        while tiles[name] > least:
            tiles[name] = max(least, tiles[name] - 1 if name == "num_stages" else tiles[name] // 2)
            yield {**constants, **tiles}


def first_that_fits(
    constants: Constants, device: torch.device, start: Callable[[Constants], None]
) -> None:
    """Start a kernel with the first tiles for which the GPU has the memory.

    Raises:
        triton.OutOfResources: It has not enough for the smallest.
    """
    if "num_stages" not in constants:
        return start(constants)
    if _compiles_for_hopper(device):
        constants = without_wgmma(constants)
    _start_first((device, *sorted(constants.items())), smaller(constants), start)


def with_fewer_stages(key: Hashable, stages: int, start: Callable[[int], None]) -> None:
    """Start a kernel with as many tiles on their way at a time as the GPU has the memory for.

    Args:
        key: Of the kernel, its tiles and the device.

    Raises:
        triton.OutOfResources: It has not enough for one.
    """
    _start_first(key, range(stages, 0, -1), start)


Choice = TypeVar("Choice")
_FIRST_THAT_FITS: dict[Hashable, int] = {}
"""Which choice of a kernel, the largest being 0, a GPU had the memory for."""


def _start_first(key: Hashable, choices: Iterable[Choice], start: Callable[[Choice], None]) -> None:
    """Start the first choice that fits; later calls of the same key begin with it."""
    refusal: Exception | None = None
    for number, choice in islice(enumerate(choices), _FIRST_THAT_FITS.get(key, 0), None):
        try:
            start(choice)
        except Exception as error:
            # By its name: Triton is not there where there is no GPU.
            if type(error).__name__ != "OutOfResources":
                raise
            refusal = error
        else:
            _FIRST_THAT_FITS[key] = number
            return
    assert refusal is not None
    raise refusal
