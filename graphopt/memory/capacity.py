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

    What a step takes must not fall with the size.

    Args:
        predict: From a size, at least 1, to the prediction with `memory` as its limit.
        most: The largest size that is asked for.
    """
    below, above = 0, 1
    fits: Prediction | None = None
    first: Prediction | None = None
    while above <= most:
        found = predict(above)
        first = first or found
        if not found.fits:
            break
        below, fits = above, found
        if above == most:
            break
        above = min(above * 2, most)
    while above - below > 1:
        middle = (below + above) // 2
        found = predict(middle)
        if found.fits:
            below, fits = middle, found
        else:
            above = middle
    prediction = fits or first
    if prediction is None:
        raise ValueError(f"there is no size between 1 and {most}")
    return Fit(below, memory, prediction, bounded=below == most)
