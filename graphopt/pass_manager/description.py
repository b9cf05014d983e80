"""What `graphopt passes` tells, as plain data; nothing is imported that only a run needs."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

from graphopt.errors import unknown_name
from graphopt.pass_manager.contract import Pass, declared_passes, default_of, type_name


def describe_passes(name: str | None = None) -> list[dict[str, Any]]:
    """Return what is known of every pass, or of one.

    Raises:
        UsageError: There is no pass of this name.
    """
    known = declared_passes()
    if name is not None and name not in known:
        raise unknown_name("pass", name, known)
    return [_describe(known[each]) for each in ([name] if name is not None else sorted(known))]


def _describe(declared: type[Pass]) -> dict[str, Any]:
    hints = typing.get_type_hints(declared)
    text = inspect.cleandoc(declared.__doc__ or "")
    return {
        "name": declared.name,
        "summary": " ".join(text.split("\n\n")[0].split()),
        "exact": declared.exact,
        "reads_weights": declared.reads_weights,
        "requires": list(declared.requires),
        "options": [
            {
                "name": option.name,
                "type": type_name(hints[option.name]),
                "default": default_of(option),
            }
            for option in dataclasses.fields(declared)
        ],
        "doc": text,
    }
