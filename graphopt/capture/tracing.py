"""torch.export as a step that says in a sentence what it cannot trace, and where in the model.

What torch itself says of a failure are names of its own parts and, in its logs, whole graphs. They
go with the error, whose traceback `--debug` prints, and not to the terminal.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from graphopt.errors import CaptureError, GraphoptError, first_line
from graphopt.support.boundary import chain, out_of_memory

_DATA = ("DataDependent", "data-dependent", "data dependent", "data-independent")
_SIZES = ("Constraints violated", "specialized", "ConstraintViolation", "Not all values of")
_LIBRARIES = ("torch", "functorch", "sympy", "graphopt", "contextlib", "inspect", "importlib")


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            self.lines.append(self.format(record))


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Inside, what is logged, warned and printed is put into the list, not on the terminal.

    torch prints the graph of a trace that failed on stderr.
    """
    printed = io.StringIO()
    collector = _Collector()
    names = [n for n in logging.root.manager.loggerDict if n == "torch" or n.startswith("torch.")]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [collector], False
    warned: list[warnings.WarningMessage] = []
    try:
        with (
            warnings.catch_warnings(record=True) as seen,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            warned = seen
            warnings.simplefilter("always")  # one made an error would end the trace
            yield collector.lines
    finally:
        collector.lines += [str(item.message) for item in warned]
        collector.lines += [printed.getvalue()] if printed.getvalue() else []
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate


@contextlib.contextmanager
def traced(where: str) -> Iterator[None]:
    """Run torch.export in the body.

    Args:
        where: What is traced, for messages.

    Raises:
        CaptureError: It cannot be; what torch logged is a note of the error that it was raised
            from.
    """
    lines: list[str] = []
    try:
        with collected() as lines:
            yield
    except GraphoptError:
        raise
    except Exception as error:  # torch.export raises whatever the traced code raises
        if out_of_memory(error):
            raise
        for line in lines:
            error.add_note(line)
        what, remedy = _cause(error)
        raise CaptureError(f"{where}{_place(error)} cannot be traced: {what}.", remedy) from error


def _cause(error: Exception) -> tuple[str, str]:
    """Return what a module does that no trace holds, and what helps."""
    said = [f"{type(link).__name__} {link}" for link in chain(error)]
    if any(word in text for text in said for word in _DATA) or _reads_values(error):
        return (
            "it branches on the values of a tensor, or makes a tensor as large as they say",
            "graphopt takes models whose computation is the same for every token; choose a config "
            "without that part.",
        )
    if any(word in text for text in said for word in _SIZES):
        return (
            "it computes with the batch or the length as a plain number",
            "Recurrent mixers and blockwise algorithms do so; such a mixer has no form in "
            "graphopt.",
        )
    frames = list(traceback.walk_tb(error.__traceback__))
    if any(Path(frame.f_code.co_filename).name == "cache_utils.py" for frame, _ in frames):
        return (
            "it keeps keys and values although it is called with use_cache=False",
            "graphopt gives models a cache itself; a model that fills its own has no form in it.",
        )
    # What the model's own code says of itself is for its user; what torch says is not.
    said_itself = frames and not _of_library(frames[-1][0])
    return (
        f"it raises {type(error).__name__}{f': {first_line(error)}' if said_itself else ''}",
        "Check that the model runs in transformers; --debug shows the traceback.",
    )


def _reads_values(error: Exception) -> bool:
    """True where a tensor without values was asked for them, which torch tries without end."""
    return isinstance(error, RecursionError) and any(
        frame.f_code.co_name == "_device_put_aten"
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _place(error: Exception) -> str:
    """Return the line of the model's own code that was running, in brackets."""
    for link in chain(error):
        for frame, line in reversed(list(traceback.walk_tb(link.__traceback__))):
            if not _of_library(frame):
                code = frame.f_code
                return f" ({Path(code.co_filename).name}, line {line}, in {code.co_name})"
    return ""


def _of_library(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in _LIBRARIES
