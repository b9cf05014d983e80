"""Sizes and times as people read them."""

from __future__ import annotations

import re

from graphopt.errors import UsageError

_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", re.IGNORECASE)


def format_bytes(count: float) -> str:
    """Return `count` bytes as `513.1 MB` and the like."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"


def counted(number: int, noun: str) -> str:
    """Return `1 step`, `2,048 steps` and the like; the plural of the noun ends with an s."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def parse_bytes(what: str, text: str) -> int:
    """Return the bytes that `24GB` (24e9) or `24GiB` (24 * 2^30) and the like mean; at least 1.

    Args:
        what: What the size is of, for the message.

    Raises:
        UsageError: The text is no size, or one beyond 2^60.
    """
    found = _BYTES.fullmatch(text)
    size = 0
    if found is not None:
        power = " kmgt".index(found[2].lower() or " ")
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if not 0 < size <= 2**60:
        raise UsageError(f"{what} {text!r} is no size.", "Give one such as 24GB or 24GiB.")
    return size


def format_duration(seconds: float) -> str:
    """Return a time as `40 s`, `12 min` or `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
