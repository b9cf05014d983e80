"""Places that were left alone for one reason, as one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

_NUMBER = re.compile(r"\d+")

_MOST_NAMED = 4
"""Places of a group that are named one by one where no run of numbers tells them apart."""


class Skipped(Protocol):
    """A place and the reason why it was left alone."""

    where: str
    reason: str


@dataclass(frozen=True)
class SkipGroup:
    """Places that one pass left alone for one reason.

    Attributes:
        source: Name of the pass, or of what else left them alone.
        where: All of the places, as one text.
        count: How many there are.
        reason: Why.
    """

    source: str
    where: str
    count: int
    reason: str


def grouped_skips(skips: Iterable[tuple[str, Skipped]]) -> list[SkipGroup]:
    """Return places in groups of one pass and one reason, whose names differ in numbers alone.

    Args:
        skips: Name of the pass, and the place.
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    for source, skip in skips:
        pattern = _NUMBER.sub("#", skip.where)
        groups.setdefault((source, skip.reason, pattern), []).append(skip.where)
    return [
        SkipGroup(source, places_in_short(where), len(where), reason)
        for (source, reason, _), where in groups.items()
    ]


def places_in_short(names: Sequence[str]) -> str:
    """Return names that differ in numbers alone as one: `model.layers.{0–17}.mlp`.

    Where more than one number differs, the first and the last stand for all of many.
    """
    unique = list(dict.fromkeys(names))
    if len(unique) == 1:
        return unique[0]
    columns = list(zip(*(_NUMBER.findall(name) for name in unique), strict=True))
    varying = [place for place, column in enumerate(columns) if len(set(column)) > 1]
    if len(varying) != 1:
        if len(unique) <= _MOST_NAMED:
            return ", ".join(unique)
        return f"{unique[0]} … {unique[-1]}"
    match = list(_NUMBER.finditer(unique[0]))[varying[0]]
    numbers = ranges(map(int, columns[varying[0]]))
    return f"{unique[0][: match.start()]}{{{numbers}}}{unique[0][match.end() :]}"


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers in ascending order, those that follow each other as a range: `0–3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
