"""What becomes of errors that are not messages to the user.

Three kinds reach the edge of graphopt: memory that did not suffice, what transformers and torch say
of a model that they cannot read or build, and bugs. The first two get their sentence here; a bug
is called one.
"""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections.abc import Iterator
from pathlib import PurePath

from graphopt.errors import CaptureError, GraphoptError, PassError, first_line

BUG_CODE = 70
"""Exit code of a bug, as sysexits.h has it for software errors."""

REPORT_BUG = "Run it again with --debug for the traceback, and report it with what you gave."

_NO_MEMORY = (
    "can't allocate memory",  # torch's DefaultCPUAllocator
    "not enough memory",  # the same on Windows
    "cannot allocate memory",  # the C library
    "failed to allocate memory",  # ONNX Runtime
    "bad_alloc",  # C++
    "can't start new thread",  # a stack could not be allocated
    "storage size calculation overflowed",
)


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from."""
    seen: set[int] = set()
    left: BaseException | None = error
    while left is not None and id(left) not in seen:
        seen.add(id(left))
        yield left
        left = left.__cause__ or (None if left.__suppress_context__ else left.__context__)


def out_of_memory(error: BaseException) -> str | None:
    """Return what had too little memory where that is why an error was raised, else None."""
    for link in chain(error):
        if isinstance(link, GraphoptError):
            continue
        if type(link).__name__ == "OutOfMemoryError":
            return "the GPU"  # torch's, whatever kind of device it is
        text = str(link).lower()
        if (
            isinstance(link, MemoryError)
            or (isinstance(link, OSError) and link.errno == errno.ENOMEM)
            or (isinstance(link, RuntimeError) and any(part in text for part in _NO_MEMORY))
        ):
            return "this machine"
    return None


def own_bug(error: BaseException) -> bool:
    """Return whether an error arose in graphopt's code rather than in what it calls."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return is_own_module(str(frames[-1].f_globals.get("__name__", "")) if frames else "graphopt")


def is_own_module(name: str) -> bool:
    """Return whether a module is graphopt's."""
    return name == "graphopt" or name.startswith("graphopt.")


@contextlib.contextmanager
def users_pass(name: str, module: str) -> Iterator[None]:
    """Give errors of a pass that is not graphopt's a sentence, with the line of the pass.

    Args:
        name: The pass.
        module: Where its class is.

    Raises:
        PassError: Naming the pass, and what went wrong where in its module.
    """
    try:
        yield
    except GraphoptError:
        raise
    except Exception as error:
        if is_own_module(module) or out_of_memory(error):
            raise
        lines = [
            f"{PurePath(frame.f_code.co_filename).name}, line {line}"
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_globals.get("__name__") == module
        ]
        where = f" in {lines[-1]}" if lines else ""
        raise PassError(
            f"Pass {name!r} failed{where}: {type(error).__name__}: {first_line(error)}.",
            "Mend the pass; --debug prints the traceback.",
        ) from error


@contextlib.contextmanager
def users_model(what: str, doing: str) -> Iterator[None]:
    """Give what libraries say of a user's model in the body a sentence.

    transformers' classes check their configs by assorted errors, or not at all, and then fail
    somewhere in torch; the types of these errors change with every release. Errors that arise in
    graphopt's own code are bugs and pass, as does a lack of memory.

    Args:
        what: The model, such as its file.
        doing: What was done with it, such as "be built".

    Raises:
        CaptureError: Naming the model and what the library said.
    """
    try:
        yield
    except GraphoptError:
        raise
    except RecursionError as error:
        raise CaptureError(
            f"{what} cannot {doing}: it is nested too deeply, or refers to itself.",
            "Check its config.json.",
        ) from error
    except Exception as error:
        if own_bug(error) or out_of_memory(error):
            raise
        raise CaptureError(
            f"{what} cannot {doing}: {first_line(error)}.",
            "Check its config.json; --debug shows where it failed.",
        ) from error
