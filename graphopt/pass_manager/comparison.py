"""How far results are apart, and what came out of comparing two programs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Comparison:
    """What came out.

    Attributes:
        changed: Calls that are not proved to be the same.
        kinds: Kinds of them, of which one call each was run.
        largest: The largest difference, as a share of the largest number of its result.
        error: What differs by more than rounding explains, as a clause; None where nothing does.
        not_run: What was not compared so, and why.
    """

    changed: int = 0
    kinds: int = 0
    largest: float = 0.0
    error: str | None = None
    not_run: list[str] = field(default_factory=list)


class Differs(Exception):
    """Results differ by more than rounding explains.

    Attributes:
        batches: The inputs that show it, where they are not the usual ones.
        is_choice: It is what an op chooses by: other tokens show it in the results.
    """

    def __init__(
        self,
        what: str,
        batches: list[dict[str, Tensor]] | None = None,
        is_choice: bool = False,
    ) -> None:
        super().__init__(what)
        self.batches, self.is_choice = batches, is_choice


class Unable(Exception):
    """A call of the program before the pass cannot be run by itself."""


def relative_difference(old: Tensor, new: Tensor, real: Tensor | None) -> float:
    """Return the largest difference as a share of the largest number; at real tokens alone."""
    if real is not None:
        old, new = old[real], new[real]
    if not old.is_floating_point():
        return 0.0 if torch.equal(old, new) else math.inf
    unequal = (old != new) & ~(old.isnan() & new.isnan())
    if not bool(unequal.any()):
        return 0.0
    largest = float(old[old.isfinite()].abs().max()) if bool(old.isfinite().any()) else 1.0
    difference = float((old - new)[unequal].abs().max())
    return difference / (largest or 1.0) if difference == difference else math.inf
