"""Recipes: which passes run, in which order, with which options.

Three forms that are the same thing:

* text, `prune-blocks{ratio=0.25},fuse-blocks`, for the command line;
* YAML, for files that are kept beside an artifact;
* a list of `Pass` objects, for Python.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import UsageError
from graphopt.pass_manager.contract import Pass, make_pass
from graphopt.pass_manager.options import Bare
from graphopt.support.inputs import read_utf8, shown_path
from graphopt.support.plain import shown
from graphopt.support.yaml_text import MAX_YAML_BYTES, format_yaml, parse_yaml

VERSION = 1

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_BARE = re.compile(r"[A-Za-z0-9_.+/:@-]+")


class _Reader:
    """Reads the text form: a cursor over one string."""

    def __init__(self, text: str, what: str = "Recipe", item: str = "pass") -> None:
        self.text, self.what, self.item = text, what, item
        self.at = 0

    def error(self, wanted: str) -> UsageError:
        rest = self.text[self.at : self.at + 12]
        found = f"{rest!r}" if rest else "the end"
        return UsageError(
            f"{self.what} {self.text!r}, character {self.at + 1}: expected {wanted}, found "
            f"{found}.",
            f"Write {self.item.upper()} or {self.item.upper()}{{option=value,...}}, separated by "
            "commas.",
        )

    def skip_space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def take(self, token: str) -> bool:
        """Step over `token` if it comes next."""
        self.skip_space()
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def match(self, pattern: re.Pattern[str], wanted: str) -> str:
        self.skip_space()
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.error(wanted)
        self.at = found.end()
        return found.group()

    def recipe(self) -> list[tuple[str, dict[str, Any]]]:
        items: list[tuple[str, dict[str, Any]]] = []
        self.skip_space()
        if self.at == len(self.text):
            return items
        while True:
            name = self.match(_NAME, f"the name of a {self.item}")
            items.append((name, self.options() if self.take("{") else {}))
            self.skip_space()
            if self.at == len(self.text):
                return items
            if not self.take(","):
                raise self.error("',' or '{'" if items[-1][1] == {} else "','")

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        while not self.take("}"):
            if options and not self.take(","):
                raise self.error("',' or '}'")
            start = self.at
            key = self.match(_NAME, "the name of an option")
            if key in options:
                self.at = start
                raise self.error(f"each option once ({key!r} is repeated)")
            if not self.take("="):
                raise self.error(f"'=' after the option {key!r}")
            options[key] = self.value()
        return options

    def value(self) -> Any:
        if not self.take("["):
            return self.scalar()
        values: list[Any] = []
        while not self.take("]"):
            if values and not self.take(","):
                raise self.error("',' or ']'")
            values.append(self.scalar())
        return values

    def scalar(self) -> str:
        if not self.take('"'):
            return Bare(self.match(_BARE, "a value"))
        letters: list[str] = []
        while not self.text.startswith('"', self.at):
            if self.text.startswith("\\", self.at):
                self.at += 1
            if self.at >= len(self.text):
                raise self.error("a closing '\"'")
            letters.append(self.text[self.at])
            self.at += 1
        self.at += 1
        return "".join(letters)


def parse_recipe(text: str) -> list[Pass]:
    """Return the passes of the text form, such as `canonicalise,prune-blocks{ratio=0.25}`.

    Values are `true`, `false`, `none`, numbers, words, `"quoted text"` with `\\"` and `\\\\`
    inside, or `[lists,of,these]`.

    Raises:
        UsageError: With the position of what is wrong, or the nearest known name.
    """
    return [make_pass(name, options) for name, options in _Reader(text).recipe()]


def parse_named_options(text: str, what: str, item: str) -> list[tuple[str, dict[str, Any]]]:
    """Return names and their options in the text form that recipes have, values as text.

    Args:
        what: What error messages call the text.
        item: What they call that which is named.

    Raises:
        UsageError: With the position of what is wrong.
    """
    return _Reader(text, what, item).recipe()


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, list):
        return "[" + ",".join(_format_value(item) for item in value) + "]"
    if isinstance(value, str):
        if _BARE.fullmatch(value) and value.lower() != "none":
            return value
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def format_recipe(passes: Sequence[Pass]) -> str:
    """Return the text form; options at their defaults are left out."""
    parts: list[str] = []
    for item in passes:
        options = [f"{key}={_format_value(value)}" for key, value in item.options().items()]
        parts.append(item.name + ("{" + ",".join(options) + "}" if options else ""))
    return ",".join(parts)


def recipe_to_yaml(passes: Sequence[Pass]) -> str:
    """Return the YAML form; options at their defaults are left out."""
    items: list[Any] = []
    for item in passes:
        options = item.options()
        items.append({item.name: options} if options else item.name)
    return format_yaml({"version": VERSION, "passes": items})


def recipe_from_yaml(text: str, where: str = "recipe") -> list[Pass]:
    """Return the passes of the YAML form.

    Args:
        where: What error messages call the text, such as its file name.

    Raises:
        UsageError: With the line of what is not YAML, or the item that is wrong.
    """
    data = parse_yaml(text, where, error=UsageError)
    remedy = "A recipe is 'version: 1' and 'passes:', a list of names or name: {option: value}."
    if not isinstance(data, Mapping) or "passes" not in data:
        raise UsageError(f"{where} has no 'passes'.", remedy)
    unknown = sorted(str(key) for key in data if key not in ("version", "passes"))
    if unknown:
        raise UsageError(f"{where} has an unknown key {shown(unknown[0])}.", remedy)
    if data.get("version", VERSION) != VERSION:
        raise UsageError(
            f"{where} has version {shown(data['version'])}, this graphopt reads {VERSION}.", remedy
        )
    items = data["passes"] or []
    if not isinstance(items, list):
        raise UsageError(f"{where}: 'passes' is not a list.", remedy)
    return [_item_from_yaml(item, number, where) for number, item in enumerate(items, 1)]


def _item_from_yaml(item: Any, number: int, where: str) -> Pass:
    if isinstance(item, str):
        return make_pass(item, {})
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, options),) = item.items()
        options = {} if options is None else options
        if isinstance(name, str) and isinstance(options, Mapping):
            return make_pass(name, {str(key): value for key, value in options.items()})
    raise UsageError(
        f"{where}: item {number} of 'passes' is {shown(item)}.",
        "Write '- name' or '- name: {option: value}'.",
    )


def read_recipe(path: Path) -> list[Pass]:
    """Return the passes of a YAML file.

    Raises:
        UsageError: The file cannot be read, or its content is wrong.
    """
    text = read_utf8(path, MAX_YAML_BYTES, error=UsageError)
    return recipe_from_yaml(text, shown_path(path))
