"""What the user types, or pipes in."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

_hidden: dict[TextIO, TextIO] = {}
"""By what `hide_stdin` put in its place, the stdin that was there."""


def hide_stdin() -> None:
    """Keep stdin from libraries, which ask there whether code may run; `stdin` still has it."""
    nothing = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    _hidden[nothing] = sys.stdin
    sys.stdin = nothing


def stdin() -> TextIO:
    """Return the stdin that the user gave: what is hidden, unless another has come since."""
    return _hidden.get(sys.stdin, sys.stdin)


def ask(prompt: str) -> str:
    """Return a line that the user types behind a prompt, with the editing that a terminal has.

    Raises:
        EOFError: There are no more.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    if not sys.stdout.isatty():  # which is to hold answers alone
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = stdin().readline()
        if not line:
            raise EOFError
        return line
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # makes `input` edit lines and remember them
    hidden, sys.stdin = sys.stdin, stdin()
    try:
        return input(prompt)
    finally:
        sys.stdin = hidden
