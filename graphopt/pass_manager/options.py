"""The options of a pass: their types, their ranges, and the text they may be given as.

An option is a field of a dataclass. Its type is `int`, `float`, `bool`, `str` or a `Literal` of
words, one of these with a range as in `Annotated[int, Field(ge=1)]`, a list of these, `... | None`,
or `... | PerDevice[...]` where the default depends on the device. Values are checked by pydantic
when a pass is made, whether a recipe, a YAML file or Python makes it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

import pydantic
from pydantic.fields import FieldInfo

from graphopt.errors import UsageError, unknown_name
from graphopt.support.per_device import PerDevice
from graphopt.support.plain import shown

MAX_NUMBER = 2**53
"""The largest whole number in a recipe: what a float, and so JSON anywhere, holds exactly."""

_SCALARS = (int, float, bool, str)
_CONFIG = pydantic.ConfigDict(
    extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, protected_namespaces=()
)


class Bare(str):
    """Text without quotes in a recipe, where `none` means the absent value."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class OptionType:
    """What an option may be.

    Attributes:
        hint: The type without `None`, without `PerDevice` and without a list around it; with its
            range.
        scalar: `int`, `float`, `bool` or `str`, the last for a choice of words too.
        choices: The words it may be; empty for any.
        many: Whether it is a list.
        optional: Whether it may be None.
        per_device: Whether its default may depend on the device.
    """

    hint: Any
    scalar: type
    choices: tuple[str, ...]
    many: bool
    optional: bool
    per_device: bool

    @classmethod
    def of(cls, option: str, hint: Any) -> OptionType:
        """Return the type that an annotation states.

        Raises:
            ValueError: It has no text form.
        """
        optional = per_device = many = False
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            members = typing.get_args(hint)
            optional = type(None) in members
            per_device = any(typing.get_origin(member) is PerDevice for member in members)
            plain = [m for m in members
                     if m is not type(None) and typing.get_origin(m) is not PerDevice]  # fmt: skip
            if len(plain) != 1:
                raise _no_text_form(option, hint)
            hint = plain[0]
        if typing.get_origin(hint) is list:
            many, (hint,) = True, typing.get_args(hint)
        bare = hint
        while typing.get_origin(bare) is typing.Annotated:
            bare = typing.get_args(bare)[0]
        choices: tuple[str, ...] = ()
        if typing.get_origin(bare) is Literal:
            choices = typing.get_args(bare)
            bare = str if all(isinstance(choice, str) for choice in choices) else None
        if bare not in _SCALARS:
            raise _no_text_form(option, hint)
        return cls(hint, bare, choices, many, optional, per_device)

    @property
    def name(self) -> str:
        """The type as `graphopt passes` shows it."""
        name = f"list[{self.scalar.__name__}]" if self.many else self.scalar.__name__
        return f"{name} | None" if self.optional else name

    @property
    def allowed(self) -> str:
        """The words or the range that a value has to be of, as text; empty for any value."""
        if self.choices:
            return ", ".join(self.choices)
        bounds: list[str] = []
        for words, key in (
            ("above {}", "gt"), ("{} or more", "ge"), ("below {}", "lt"), ("{} or less", "le"),
        ):  # fmt: skip
            for bound in _metadata(self.hint):
                if getattr(bound, key, None) is not None:
                    bounds.append(words.format(getattr(bound, key)))
        return " and ".join(bounds)

    @property
    def accepted(self) -> Any:
        """The type that pydantic checks values by."""
        accepted = list[self.hint] if self.many else self.hint  # type: ignore[name-defined]
        return accepted | None if self.optional else accepted

    def prepared(self, value: Any) -> Any:
        """Return a value, or the text of one, as pydantic takes it.

        Raises:
            ValueError: A truth value is given where a number is wanted.
        """
        if self.optional and isinstance(value, Bare) and value.lower() == "none":
            return None
        if self.many:
            items = value if isinstance(value, list | tuple) else [value]
            return [self._scalar(item) for item in items]
        return self._scalar(value)

    def _scalar(self, value: Any) -> Any:
        if isinstance(value, str):
            return str(value)
        if isinstance(value, bool) and self.scalar is not bool:
            if self.scalar is not str:
                raise ValueError(f"{value} is not {_a(self.scalar)}")
            return str(value).lower()
        return value


def _metadata(hint: Any) -> Iterable[Any]:
    """Yield the bounds that `Annotated` gives a type."""
    if typing.get_origin(hint) is not typing.Annotated:
        return
    inner, *extras = typing.get_args(hint)
    yield from _metadata(inner)
    for extra in extras:
        yield from extra.metadata if isinstance(extra, FieldInfo) else (extra,)


def _no_text_form(option: str, hint: Any) -> ValueError:
    return ValueError(f"option {option!r} has the type {hint}, which has no text form")


def default_of(option: dataclasses.Field[Any]) -> Any:
    """Return the default of a dataclass field.

    Raises:
        ValueError: It has none.
    """
    if option.default is not dataclasses.MISSING:
        return option.default
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    raise ValueError(f"option {option.name!r} of a pass needs a default")


@lru_cache
def option_types(cls: type[Any]) -> dict[str, OptionType]:
    """Return the type of every option of a pass, in their order.

    Raises:
        ValueError: One has no text form.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: OptionType.of(f.name, hints[f.name]) for f in dataclasses.fields(cls)}


@lru_cache
def options_model(cls: type[Any]) -> type[pydantic.BaseModel]:
    """Return the pydantic model of a pass's options."""
    fields: dict[str, Any] = {}
    kinds = option_types(cls)  # type: ignore[arg-type]
    for option in dataclasses.fields(cls):
        default = default_of(option)
        info = pydantic.Field(default)
        if isinstance(default, PerDevice):
            told = f"By default {default}."
            info = pydantic.Field(None, description=told, json_schema_extra=_without_default)
        fields[option.name] = (kinds[option.name].accepted, info)
    return pydantic.create_model(cls.__name__, __config__=_CONFIG, **fields)


def _without_default(schema: dict[str, Any]) -> None:
    """Leave out what is a default and no value: its description says it."""
    schema.pop("default", None)


def validated(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a pass's options as their types say.

    Args:
        values: Values of the right type, or their text.

    Raises:
        UsageError: A value is of the wrong type or out of range; the message has option, value,
            and what is allowed.
    """
    name, kinds = cls.name, option_types(cls)  # type: ignore[arg-type]
    fixed = {
        key: value
        for key, value in values.items()
        if isinstance(value, PerDevice) and kinds[key].per_device
    }
    prepared: dict[str, Any] = {}
    for key, value in values.items():
        if key in fixed:
            continue
        try:
            prepared[key] = kinds[key].prepared(value)
        except ValueError as error:
            raise _refusal(name, key, str(error), kinds[key]) from None
    try:
        model = options_model(cls).model_validate(prepared)  # type: ignore[arg-type]
    except pydantic.ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        key = str(first["loc"][0])
        raise _misfit(name, key, values[key], first, kinds[key]) from None
    found = {key: getattr(model, key) for key in prepared}
    for key, value in found.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > MAX_NUMBER:
                raise _refusal(name, key, f"{shown(number)} is out of reach", kinds[key])
    return {**found, **fixed}


_BOUNDS = {
    "greater_than": ("gt", "not above"),
    "greater_than_equal": ("ge", "below"),
    "less_than": ("lt", "not below"),
    "less_than_equal": ("le", "above"),
}


def _misfit(name: str, key: str, value: Any, problem: Any, kind: OptionType) -> UsageError:
    """Return the sentence for what pydantic found first."""
    a_number = "a number " if kind.allowed.startswith(("above", "below")) else ""
    remedy = f"Give {a_number}{kind.allowed}, or leave {key} out."
    if problem["type"] in _BOUNDS and abs(float(problem["input"])) > MAX_NUMBER:
        return _refusal(name, key, f"{shown(problem['input'])} is out of reach", kind)
    if problem["type"] in _BOUNDS:
        bound, words = _BOUNDS[problem["type"]]
        said = f"{name}: {key}={problem['input']} is {words} {problem['ctx'][bound]}."
        return UsageError(said, remedy)
    if problem["type"] == "literal_error":
        near = unknown_name("choice", str(problem["input"]), kind.choices).remedy
        return UsageError(f"{name} knows no {key} {shown(problem['input'])}.", near)
    if problem["type"] == "finite_number":
        return _refusal(name, key, f"{shown(problem['input'])} is not finite", kind)
    return _refusal(name, key, f"{shown(problem['input'])} is not {_a(kind.scalar)}", kind)


def _refusal(name: str, key: str, why: str, kind: OptionType) -> UsageError:
    allowed = f", {kind.allowed}" if kind.allowed else ""
    return UsageError(
        f"Option {key!r} of pass {name!r}: {why}.",
        f"Write {key}=VALUE, {_a(kind.scalar)}{allowed}.",
    )


def _a(scalar: type) -> str:
    return f"{'an' if scalar is int else 'a'} {scalar.__name__}"
