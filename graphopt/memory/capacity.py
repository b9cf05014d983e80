"""The largest size that fits, by bisection over predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from graphopt.memory.predict import Prediction
from graphopt.memory.scaled import ScaledTrace
from graphopt.memory.trace import Trace

SCALED_FROM = 2
"""The first size from which others are worked out: of size 1, torch leaves operations out."""


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


def largest(
    predict: Callable[[int], Prediction],
    memory: int,
    *,
    most: int,
    serve: Callable[[Trace], Prediction] | None = None,
    degree: int = 1,
) -> Fit:
    """Return the largest size of which a prediction says that it fits.

    What a step takes must not fall with the size. It is nearly linear in it, so that a line through
    two small sizes says where to begin; how near that is to the answer decides only how long the
    search takes.

    With `serve`, sizes on the way are not predicted: their traces are worked out from those of a
    few small sizes, and served. The answer is predicted, and where its trace is another one than
    was worked out, the search is made again with predictions alone.

    Args:
        predict: From a size, at least 1, to the prediction with `memory` as its limit.
        most: The largest size that is asked for.
        serve: From a trace to the prediction with the same limit.
        degree: That of the polynomial of the size that the bytes of any tensor are, for `serve`.

    Raises:
        ValueError: `most` is less than 1.
    """
    if most < 1:
        raise ValueError(f"there is no size between 1 and {most}")
    predict = functools.cache(predict)
    if not predict(1).fits:
        return Fit(0, memory, predict(1))
    guess = min(_by_line(predict, memory), most)
    if guess == most and predict(most).fits:
        return Fit(most, memory, predict(most), bounded=True)
    if serve is not None and SCALED_FROM + degree < guess:
        sizes = range(SCALED_FROM, SCALED_FROM + degree + 1)
        scaled = ScaledTrace.of([predict(size).trace for size in sizes], SCALED_FROM)
        if scaled is not None:
            value = _search(partial(_served, predict, serve, scaled), guess, most)
            if value >= SCALED_FROM and scaled.agrees(value, predict(value).trace):
                return Fit(value, memory, predict(value), bounded=value == most)
    value = _search(lambda size: predict(size).fits, guess, most)
    return Fit(value, memory, predict(value), bounded=value == most)


def _served(
    predict: Callable[[int], Prediction],
    serve: Callable[[Trace], Prediction],
    scaled: ScaledTrace,
    size: int,
) -> bool:
    """Return whether a size fits, by its trace as it is worked out; small ones are predicted."""
    return (predict(size) if size < SCALED_FROM else serve(scaled.at(size))).fits


def _search(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """Return the largest size that fits, where 1 does, from a first guess on."""
    below, above = 1, most + 1  # the first fits, the second does not or is not asked for
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
    return below


def _by_line(predict: Callable[[int], Prediction], memory: int) -> int:
    """Return the size at which a line through the bytes of sizes 1 and 2 reaches the memory."""
    first = predict(1)
    slope = predict(2).allocated - first.allocated
    return 1 + (memory - first.allocated) // slope if slope > 0 else 2
