"""Sharing out a budget of units between layers, so that the costs have the least sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def allocate_budget(
    costs: Sequence[Sequence[float]], sizes: Sequence[int], least: int, total: int
) -> list[int]:
    """Return numbers of pieces whose costs have the least sum, of those that fit.

    Args:
        costs: For every part its cost with `least` pieces, with one more, and so on; infinite for
            numbers it may not have. Of equal costs the fewest pieces are taken.
        sizes: Neurons of a part's pieces.
        total: Neurons that may be run, over all parts.

    Raises:
        ValueError: No numbers of a finite cost fit.
    """
    unit = math.gcd(*sizes)
    steps = [size // unit for size in sizes]
    room = total // unit
    # best[n]: the least sum of costs so far with n units.
    best = np.zeros(room + 1)
    choices: list[np.ndarray] = []
    for own, step in zip(costs, steps, strict=True):
        sums = np.full((len(own), room + 1), np.inf)
        for number, cost in enumerate(own):
            taken = (least + number) * step
            if taken <= room:
                sums[number, taken:] = best[: room + 1 - taken] + cost
        choices.append(sums.argmin(0))
        best = sums.min(0)
    if not np.isfinite(best[room]):
        raise ValueError(f"no numbers of pieces that parts may have fit into {total} neurons")
    numbers: list[int] = []
    for chosen, step in zip(reversed(choices), reversed(steps), strict=True):
        numbers.append(least + int(chosen[room]))
        room -= numbers[-1] * step
    return numbers[::-1]
