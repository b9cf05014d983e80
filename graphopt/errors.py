"""The errors users see: what went wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphoptError(Exception):
    """Base of every error that is a message to the user rather than a bug.

    Args:
        message: One sentence that says what is wrong and where.
        remedy: One sentence that says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


class UsageError(GraphoptError):
    """The arguments are wrong: an unknown name, a bad value, an impossible combination."""

    exit_code = 2


class SourceError(GraphoptError):
    """A model, tokenizer or text could not be read."""


class CaptureError(GraphoptError):
    """The model could not be brought into the IR."""


class VerifyError(GraphoptError):
    """The program is malformed, or a pass changed its results beyond the stated tolerance."""


class ParseError(GraphoptError):
    """A program's text does not say a program.

    Args:
        line, column: Where, both from 1 up.
        expected: What should be there.
        found: What is there.
    """

    def __init__(self, line: int, column: int, expected: str, found: str) -> None:
        super().__init__(f"Line {line}, column {column}: expected {expected}, found {found}.")
        self.line, self.column = line, column


class PassError(GraphoptError):
    """A pass can't run on this program."""


class LoweringError(GraphoptError):
    """The program can't be emitted in this form or for this target."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for an unknown `kind` called `name`, with the nearest known name.

    Nearest is one that begins with `name`, otherwise the most alike.
    """
    choices = sorted(known)
    longer = [choice for choice in choices if name and choice.startswith(name)]
    near = longer or difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"Unknown {kind} {name!r}.", f"{hint} Known: {', '.join(choices)}.".strip())


def first_line(error: BaseException) -> str:
    """Return what went wrong, in one line of at most 300 letters without a full stop.

    The error may wrap the one that says it.
    """
    text = str(error.__cause__ or error).strip()
    line = text.splitlines()[0].strip() if text else ""
    if not line or isinstance(error, KeyError):
        line = f"{type(error).__name__} {line}".strip()
    return (line if len(line) <= 300 else line[:300] + "...").rstrip(".:")


def described(error: BaseException) -> str:
    """Return the class of an error and its first line, without a full stop."""
    kind, line = type(error).__name__, first_line(error)
    return line if line.split(" ")[0] == kind else f"{kind}: {line}"
