"""Text from outside, made fit to be shown.

Names, notes, tokens and whatever else a model brings may hold control characters. A terminal obeys
them: they move its cursor, rename its window or write to its clipboard. Direction overrides make a
name read as another one.
"""

from __future__ import annotations

import re

_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # all but tab and line feed
    "\u2028\u2029\u202a-\u202e\u2066-\u2069"  # lines and directions of Unicode's own
    "\ud800-\udfff]"  # halves of characters, which no terminal can be sent
)


def plain_text(text: str) -> str:
    """Return text with its control characters written as Python writes them: `\\x1b[31m`."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def plain_line(text: str) -> str:
    """Return text as `plain_text` does, in one line."""
    return plain_text(text).replace("\n", "\\n")
