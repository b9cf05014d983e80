"""The largest size that fits, by bisection over predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphopt.memory.predict import Prediction


@dataclass(frozen=True)
class Fit:
    """The largest size that fits a memory.

    Attributes:
        value: The size; 0 where not even 1 fits.
        memory: Bytes of the memory.
        prediction: What a step of that size takes; of size 1 where none fits.
        bounded: Nothing larger was asked for: it may be that more would fit.
    """

    value: int
    memory: int
    prediction: Prediction
    bounded: bool = False


def largest(predict: Callable[[int], Prediction], memory: int, *, most: int) -> Fit:
    """Return the largest size of which a prediction says that it fits.

    What a step takes must not fall with the size. It is nearly linear in it, so that a line through
    two small sizes says where to begin; how near that is to the answer decides only how long the
    search takes.

    Args:
        predict: From a size, at least 1, to the prediction with `memory` as its limit.
        most: The largest size that is asked for.

    Raises:
        ValueError: `most` is less than 1.
    """
    if most < 1:
        raise ValueError(f"there is no size between 1 and {most}")
    known: dict[int, Prediction] = {}

    def fits(size: int) -> bool:
        known[size] = predict(size)
        return known[size].fits

    if not fits(1):
        return Fit(0, memory, known[1])
    below, above = 1, most + 1  # the first fits, the second does not or is not asked for
    guess = min(_by_line(known[1], predict, memory), most)
    step = max(1, guess // 64)
    while above - below > 1:
        size = min(max(guess, below + 1), above - 1)
        if fits(size):
            below = size
            guess = size + step if above == most + 1 else (size + above) // 2
        else:
            above = size
            guess = size - step if below == 1 else (below + size) // 2
        step *= 2
    return Fit(below, memory, known[below], bounded=below == most)


def _by_line(first: Prediction, predict: Callable[[int], Prediction], memory: int) -> int:
    """Return the size at which a line through the bytes of sizes 1 and 2 reaches the memory."""
    slope = predict(2).allocated - first.allocated
    return 1 + (memory - first.allocated) // slope if slope > 0 else 2
