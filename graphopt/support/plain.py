"""Text from outside, made fit to be shown.

Names, notes, tokens and whatever else a model brings may hold control characters. A terminal obeys
them: they move its cursor, rename its window or write to its clipboard. Direction overrides make a
name read as another one.
"""

from __future__ import annotations

import inspect
import re
import reprlib
from collections.abc import Sequence
from typing import Any

CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # all but tab and line feed
    r"\u2028\u2029\u202a-\u202e\u2066-\u2069"  # lines and directions of Unicode's own
    r"\ud800-\udfff]"  # halves of characters, which no terminal can be sent
)


def plain_text(text: str) -> str:
    """Return text with its control characters written as Python writes them: `\\x1b[31m`."""
    return CONTROL.sub(lambda match: ascii(match.group())[1:-1], text)


def plain_text_source() -> str:
    """Return `plain_text` as a text that needs `import re` alone, for scripts in artifacts."""
    pattern = f'CONTROL = re.compile(\n    r"{CONTROL.pattern}"\n)'
    return f"{pattern}\n\n\n{inspect.getsource(plain_text)}"


def plain_line(text: str) -> str:
    """Return text as `plain_text` does, in one line."""
    return plain_text(text).replace("\n", "\\n")


def first_and_count(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are: `a and 2 more`."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 3
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


def shown(value: Any) -> str:
    """Return a value as an error message shows it: whole where it is short, else its beginning."""
    return _SHORT.repr(value)
