"""What is recorded: a step that can be repeated, and what its tensors hold."""

from __future__ import annotations

import contextlib
import inspect
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import UsageError, described, unknown_name
from graphopt.memory.recording import Tags, record
from graphopt.memory.trace import Trace


def _no_tags() -> Tags:
    return {}


@dataclass(frozen=True)
class Workload:
    """A step that can be repeated, whose tensors exist already.

    Attributes:
        name: What it is, in a line.
        step: Does it once.
        tags: What tensors hold, from now on.
        device: Where it computes.
        warm_up: After how many steps everything exists that stays, such as optimizer states.
        sizes: Which of "batch" and "seq" it depends on.
    """

    name: str
    step: Callable[[], Any]
    device: torch.device
    tags: Callable[[], Tags] = _no_tags
    warm_up: int = 0
    sizes: tuple[str, ...] = ("batch", "seq")

    def record(self, iterations: int = 1, **options: Any) -> Trace:
        """Return the trace of steps; see `graphopt.memory.record` for the options."""
        return record(
            self.step, iterations=iterations, device=self.device, tags=self.tags, **options
        )


def script_workload(
    reference: str, device: torch.device, *, batch: int = 1, seq: int = 128
) -> Workload:
    """Return the workload that a function of a user's file is.

    The function may have parameters `device`, `batch` and `seq`. A step is a call of it. Where the
    first call returns a callable, it has set up what a step needs, and steps are calls of that;
    the set-up then belongs to the first step. As for Python, modules beside the file can be
    imported.

    Args:
        reference: `FILE.py:FUNCTION`.
        device: Where tensors are made that name no device, also by the file itself.

    Raises:
        UsageError: There is no such file or function, it needs other arguments, a call would not
            run it (generators, coroutines), or the file fails.
    """
    path, _, name = reference.rpartition(":")
    if not path or not Path(path).is_file():
        raise UsageError(
            f"There is no file {path or reference!r}.",
            "Give FILE.py:FUNCTION, with a file that exists.",
        )
    folder = str(Path(path).resolve().parent)
    try:
        with device, _importable(folder):
            found = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path} fails: {described(error)}.") from error
    function = found.get(name)
    if not callable(function) or inspect.isclass(function):
        functions = [key for key, value in found.items() if inspect.isroutine(value)]
        raise unknown_name(f"function of {path}", name, functions)
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        raise UsageError(
            f"{reference} is a generator or a coroutine: a call of it runs nothing.",
            "Name a function that runs it to its end.",
        )
    known: dict[str, Any] = {"device": device, "batch": batch, "seq": seq}
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:
        raise UsageError(
            f"{reference} does not say which parameters it has.",
            "Name a function written in Python.",
        ) from error
    missing = [
        parameter.name
        for parameter in parameters.values()
        if parameter.name not in known
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if missing:
        raise UsageError(
            f"{reference} needs {missing[0]!r}, which is not known.",
            "Its parameters may be device, batch and seq; give others a default.",
        )
    options = {key: value for key, value in known.items() if key in parameters}

    made: list[Callable[[], Any]] = []

    def step() -> Any:
        with device, _importable(folder):
            if made:
                return made[0]()
            out = function(**options)
            if not callable(out) or isinstance(out, torch.nn.Module):
                return out
            made.append(out)
            return out()

    step.__qualname__ = reference
    sizes = tuple(key for key in ("batch", "seq") if key in options)
    return Workload(reference, step, device, sizes=sizes)


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Let modules of a folder be imported, as Python does for the folder of a script."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the script may have taken it out itself
            sys.path.remove(folder)
