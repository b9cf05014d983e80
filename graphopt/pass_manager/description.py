"""What `graphopt passes` tells, as plain data; nothing is imported that only a run needs."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from graphopt.errors import unknown_name
from graphopt.pass_manager.contract import Pass, declared_passes
from graphopt.pass_manager.options import OptionType, default_of, option_types
from graphopt.support.per_device import PerDevice


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
    kinds = option_types(declared)
    text = inspect.cleandoc(declared.__doc__ or "")
    return {
        "name": declared.name,
        "summary": " ".join(text.split("\n\n")[0].split()),
        "exact": declared.exact,
        "reads_weights": declared.reads_weights,
        "requires": list(declared.requires),
        "options": [
            _describe_option(option, kinds[option.name]) for option in dataclasses.fields(declared)
        ],
        "doc": text,
    }


def _describe_option(option: dataclasses.Field[Any], kind: OptionType) -> dict[str, Any]:
    default = default_of(option)
    if isinstance(default, PerDevice):
        default = dataclasses.asdict(default)
    return {"name": option.name, "type": kind.name, "allowed": kind.allowed, "default": default}
