"""Reading YAML that people write: the scalars of JSON, lists and mappings, and no more."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, NoReturn

import yaml

from graphopt.errors import SourceError
from graphopt.support.inputs import (
    MAX_DEPTH,
    Error,
    RefusedText,
    finite_number,
    refuse_surrogates,
    whole_number,
)
from graphopt.support.plain import shown

MAX_YAML_BYTES = 2**18
"""The largest recipe; people write them by hand."""


class _Loader(yaml.SafeLoader):
    """YAML without what lets a short text stand for a large or surprising value.

    Scalars are those of JSON (YAML 1.2's core schema): `null`, `true`, `false`, decimal numbers
    and text; no dates, octal or sexagesimal numbers. There are no aliases and no other tags, and
    no key occurs twice.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (declared so by the base)
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}
    yaml_multi_constructors: ClassVar[dict[str | None, Any]] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(None, None, "aliases are not read", event.start_mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            problem = f"it is nested deeper than {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(None, None, problem, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def refuse(self, node: yaml.Node) -> NoReturn:
        raise yaml.MarkedYAMLError(
            None, None, f"values of kind {shown(node.tag)} are not read", node.start_mark
        )

    def mapping(self, node: yaml.Node) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            self.refuse(node)
        result: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.MarkedYAMLError(
                    None, None, "a key is a list or a mapping", key_node.start_mark
                )
            if key in result:
                raise yaml.MarkedYAMLError(
                    None, None, f"the key {shown(key)} occurs twice", key_node.start_mark
                )
            result[key] = self.construct_object(value_node, deep=True)
        return result

    def sequence(self, node: yaml.Node) -> list[Any]:
        if not isinstance(node, yaml.SequenceNode):
            self.refuse(node)
        return [self.construct_object(item, deep=True) for item in node.value]

    def scalar(self, node: yaml.ScalarNode, convert: Callable[[str], Any]) -> Any:
        try:
            return convert(self.construct_scalar(node))
        except (ValueError, KeyError) as problem:
            text = str(problem) if isinstance(problem, RefusedText) else "a value is malformed"
            raise yaml.MarkedYAMLError(None, None, text, node.start_mark) from None


_YAML_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_YAML_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _yaml_word(text: str) -> Any:
    return _YAML_WORDS[text.lower()]


def _yaml_float(text: str) -> float:
    special = _YAML_FLOATS.get(text.lower().replace("+", "").replace(".", ""))
    return finite_number(text) if special is None else special


_YAML_SCALARS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", "~nN", _yaml_word),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", _yaml_word),
    "int": (r"[-+]?[0-9]+", "-+0123456789", whole_number),
    "float": (
        r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
        _yaml_float,
    ),
}
"""YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema): the pattern, the
characters it starts with, and how a scalar is read. Octal and hexadecimal numbers are left out."""


class _Dumper(yaml.SafeDumper):
    """YAML that quotes every text which YAML 1.1 or 1.2 would read as something else."""


def _register_scalars() -> None:
    prefix = "tag:yaml.org,2002:"
    for name, (pattern, first, convert) in _YAML_SCALARS.items():
        starts = [*first, ""] if name == "null" else list(first)
        whole = re.compile(f"(?:{pattern})\\Z")
        _Loader.add_implicit_resolver(prefix + name, whole, starts)
        _Dumper.add_implicit_resolver(prefix + name, whole, starts)
        _Loader.add_constructor(prefix + name, functools.partial(_Loader.scalar, convert=convert))
    _Loader.add_constructor(prefix + "str", functools.partial(_Loader.scalar, convert=str))
    _Loader.add_constructor(prefix + "seq", _Loader.sequence)
    _Loader.add_constructor(prefix + "map", _Loader.mapping)
    _Loader.add_constructor(None, _Loader.refuse)


_register_scalars()


def format_yaml(value: Any) -> str:
    """Return a value of the scalars of JSON, lists and mappings as YAML; `parse_yaml` reads it."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str, where: str, *, error: Error = SourceError) -> Any:
    """Return the value of a YAML text: the scalars of JSON, lists and mappings; see `_Loader`.

    Args:
        where: What error messages call it, such as its file name.

    Raises:
        error: With the line of what is not YAML or not read.
    """
    remedy = "Mend the file."
    if len(text) > MAX_YAML_BYTES:
        raise error(f"{where} has {len(text)} characters, more than {MAX_YAML_BYTES}.", remedy)
    try:
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""
        said = problem.problem or problem.context or "it cannot be read"
        raise error(f"{where}{place} is not YAML: {said}.", remedy) from problem
    except yaml.reader.ReaderError as problem:
        raise error(
            f"{where}, character {problem.position + 1}, is not YAML: {problem.reason}.", remedy
        ) from problem
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError) as problem:
        # The scanner lets through what int and chr say of an escape such as "\U00110000".
        raise error(f"{where} is not YAML: {problem}.", remedy) from problem
    refuse_surrogates(value, where, remedy, error)
    return value
