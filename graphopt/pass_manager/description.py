"""What `graphopt passes` tells, as plain data; nothing is imported that only a run needs."""

from __future__ import annotations

import dataclasses
import inspect
import re
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
    types = option_types(declared)
    text, _ = _sections(declared.__doc__)
    meanings = option_meanings(declared)
    return {
        "name": declared.name,
        "summary": " ".join(text.split("\n\n")[0].split()),
        "exact": declared.exact,
        "reads_weights": declared.reads_weights,
        "requires": list(declared.requires),
        "options": [
            _describe_option(option, types[option.name], meanings.get(option.name, ""))
            for option in dataclasses.fields(declared)
        ],
        "doc": text,
    }


def _describe_option(
    option: dataclasses.Field[Any], option_type: OptionType, meaning: str
) -> dict[str, Any]:
    default = default_of(option)
    if isinstance(default, PerDevice):
        default = dataclasses.asdict(default)
    return {
        "name": option.name,
        "meaning": meaning,
        "type": option_type.name,
        "allowed": option_type.allowed,
        "default": default,
    }


def option_meanings(declared: type[Any]) -> dict[str, str]:
    """Return what options mean, by their names, as docstrings say it.

    That of a pass, and of what it inherits options from, has a section `Options:` with an entry
    `name: Meaning.` each.
    """
    meanings: dict[str, str] = {}
    for base in reversed(declared.__mro__):
        _, section = _sections(base.__dict__.get("__doc__"))
        entries = re.split(r"^ {4}(\w+): ", section, flags=re.MULTILINE)
        for name, meaning in zip(entries[1::2], entries[2::2], strict=True):
            meanings[name] = " ".join(meaning.split())
    return meanings


def _sections(docstring: str | None) -> tuple[str, str]:
    """Return a docstring without its section `Options:`, which stands last, and that section."""
    text, _, options = inspect.cleandoc(docstring or "").partition("\nOptions:\n")
    return text.rstrip(), options
