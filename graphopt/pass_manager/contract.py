"""What a pass is, what it returns, and the registry of passes."""

from __future__ import annotations

import dataclasses
import importlib
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from graphopt.errors import UsageError, unknown_name
from graphopt.pass_manager.declarations import Declaration, declarations
from graphopt.support.inputs import OpenSchema, shown
from graphopt.support.progress import Progress, silent

if TYPE_CHECKING:
    # Passes are listed without torch, which takes seconds to import.
    import torch
    from torch import Tensor

    from graphopt.ir.graph import Program
    from graphopt.sources.windows import Bos


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


@dataclass(frozen=True)
class Skip:
    """A place a pass matched and left alone.

    Attributes:
        where: Module path or function, and the value there.
        reason: Why, as a clause a user understands.
    """

    where: str
    reason: str


@dataclass
class PassResult:
    """What a pass did.

    Attributes:
        program: The transformed program; a pass may return the one it was given, changed.
        matched: Places where the pattern of the pass was found.
        changed: Places that were rewritten; 0 promises that the program is as it was.
        skipped: Matched places left alone, with the reason.
        details: Figures of this pass alone, for the report; plain JSON data.
    """

    program: Program
    matched: int = 0
    changed: int = 0
    skipped: list[Skip] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What a pass may use beside the program.

    Attributes:
        text: Calibration text; also the probe text of verification.
        built_in: Whether the text is the built-in one, because the user gave none.
        bos: Which windows of text begin with what the tokenizer puts before a text.
        tokenizer: Folder with the model's tokenizer files; None if there is none.
        device: Where a pass may compute.
        seed: Seed of everything random in a pass.
        progress: Called as `progress(what, done, total)`.
        work: Folder for large intermediate results; None where nothing may be written.
        dense: The program before the first pass that is not exact: what lossy passes are
            measured against and distil from; None before there is one.
        earlier: `PassResult.details` of the passes before, by name, and their `options`.
        written: Tokens that the model wrote in place of the built-in text, once a pass asked for
            more than it has; see `graphopt.calibration.text.calibration_windows`.
        begin: Ids that every window begins with; None before a text was cut.
    """

    text: str = ""
    built_in: bool = False
    tokenizer: Path | None = None
    device: torch.device = field(default_factory=_cpu)
    seed: int = 0
    progress: Progress = silent
    work: Path | None = None
    dense: Program | None = None
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    written: Tensor | None = None
    bos: Bos = "every"
    begin: tuple[int, ...] | None = None


@dataclass
class Pass(ABC):
    """One transformation of a program.

    A subclass is a dataclass whose fields are its options (`int`, `float`, `bool`, `str`,
    `list[...]` of these, or `... | None`), with a default each, and whose docstring numbers its
    legality rules. Register it with `register_pass`.

    Attributes:
        name: What the command line and recipes call it.
        exact: True where logits must stay equal within rounding; the pipeline checks it.
        reads_weights: True where trained weights are read or made. Passes that don't are run
            on the structure alone for `--dry-run` and before any weight is read.
        requires: What must hold before it: names of passes earlier in the recipe, or names in
            `PROPERTIES`, with `!` in front for "must not hold".
        read_later: What later passes read of its `PassResult.details`: those of a snapshot are
            checked against it.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()
    read_later: ClassVar[type[OpenSchema]] = OpenSchema

    def check(self, program: Program) -> None:  # noqa: B027  (a hook: nothing to check by default)
        """Refuse a program or options this pass can't take, from the structure alone.

        Raises:
            PassError: With the reason and the remedy.
        """

    @abstractmethod
    def run(self, program: Program, context: Context) -> PassResult:
        """Transform `program`, which the pass may change in place.

        Raises:
            PassError: The pass can't run on this program.
        """

    def options(self) -> dict[str, Any]:
        """Return the options that are not at their defaults, in the order of the fields."""
        changed: dict[str, Any] = {}
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if value != default_of(option):
                changed[option.name] = value
        return changed


PROPERTIES: dict[str, Callable[[Program], bool]] = {
    "kv-cache": lambda program: bool(program.states),
}
"""Properties of a program that `Pass.requires` may name."""

_PASSES: dict[str, type[Pass]] = {}

P = TypeVar("P", bound=Pass)


def register_pass(cls: type[P]) -> type[P]:
    """Class decorator: make a pass known under its name.

    Raises:
        ValueError: The name is taken, the class is not a dataclass, or an option has no default
            or a type that has no text form.
    """
    other = _PASSES.get(cls.name)
    if other is not None and other.__qualname__ != cls.__qualname__:
        raise ValueError(f"pass {cls.name!r} is registered twice: {other} and {cls}")
    if "__dataclass_fields__" not in cls.__dict__:
        raise ValueError(f"pass {cls.name!r} is not a dataclass: put @dataclass on {cls}")
    hints = typing.get_type_hints(cls)
    for option in dataclasses.fields(cls):
        default_of(option)
        coerce(option.name, None, hints[option.name], check_only=True)
    _PASSES[cls.name] = cls
    return cls


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


@cache
def _declarations() -> dict[str, Declaration]:
    """Return what entry points declare, by the name of the pass.

    The passes of this distribution are offered there too: they lie above this package, which does
    not know them.
    """
    known: dict[str, Declaration] = {}
    for declaration in declarations():
        if declaration.declared is not None:
            known[declaration.declared.name] = declaration
            continue
        before = set(_PASSES)
        importlib.import_module(declaration.module)
        for name in set(_PASSES) - before:
            known[name] = Declaration(declaration.module, _PASSES[name])
    return known


def declared_passes() -> dict[str, type[Pass]]:
    """Return every known pass by name, as declared: without methods where it is not imported."""
    declared = {n: d.declared for n, d in _declarations().items() if d.declared is not None}
    return {**declared, **_PASSES}


def get_pass(name: str) -> type[Pass]:
    """Return the pass called `name`.

    Raises:
        UsageError: There is none; the message has the nearest name.
    """
    if name not in _PASSES:
        if name not in _declarations():
            raise unknown_name("pass", name, declared_passes())
        importlib.import_module(_declarations()[name].module)
    return _PASSES[name]


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """Return the pass called `name` with its options coerced to their types.

    Args:
        options: Values of the right type, or their text.

    Raises:
        UsageError: Unknown pass or option, or a value of the wrong type.
    """
    cls = get_pass(name)
    hints = typing.get_type_hints(cls)
    known = {option.name for option in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            if not known:
                raise UsageError(f"Pass {name!r} has no option {key!r}.", "It takes no options.")
            raise unknown_name(f"option of pass {name!r},", key, known)
        try:
            values[key] = coerce(key, value, hints[key])
        except ValueError as error:
            raise UsageError(
                f"Option {key!r} of pass {name!r}: {error}.", f"Write {key}=VALUE."
            ) from None
    return cls(**values)


class Bare(str):
    """Text without quotes in a recipe, where `none` means the absent value."""

    __slots__ = ()


def type_name(hint: Any) -> str:
    """Return an option's type as `graphopt passes` shows it."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


MAX_NUMBER = 2**53
"""Of a whole number in a recipe: what a float, and so JSON anywhere, holds exactly."""

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def coerce(key: str, value: Any, hint: Any, *, check_only: bool = False) -> Any:
    """Return `value`, or the text of one, as `hint`.

    Args:
        check_only: Only check that `hint` is a type options may have.

    Raises:
        ValueError: `value` does not fit, or `hint` is no type an option may have.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        if len(inner) != 1:
            raise ValueError(f"option {key!r} has the type {hint}, which has no text form")
        if check_only:
            return coerce(key, value, inner[0], check_only=True)
        if value is None or (isinstance(value, Bare) and value.lower() == "none"):
            return None
        return coerce(key, value, inner[0])
    if origin is list:
        if check_only:
            return coerce(key, value, arguments[0], check_only=True)
        items = value if isinstance(value, list | tuple) else [value]
        return [coerce(key, item, arguments[0]) for item in items]
    if hint not in (int, float, bool, str):
        raise ValueError(f"option {key!r} has the type {hint}, which has no text form")
    return None if check_only else _coerce_scalar(value, hint)


def _coerce_scalar(value: Any, hint: type) -> Any:
    wrong = ValueError(f"{shown(value)} is not {'an' if hint is int else 'a'} {hint.__name__}")
    if isinstance(value, list | tuple | dict) or value is None:
        raise wrong
    if hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() not in _BOOLS:
            raise wrong
        return _BOOLS[str(value).lower()]
    if isinstance(value, bool) and hint is not str:
        raise wrong
    if hint is int:
        if isinstance(value, float) and not value.is_integer():
            raise wrong
        try:
            number = int(value)
        except (ValueError, OverflowError):
            raise wrong from None
        if abs(number) > MAX_NUMBER:
            raise ValueError(f"{shown(value)} is out of reach")
        return number
    if hint is float:
        try:
            real = float(value)
        except (ValueError, OverflowError):
            raise wrong from None
        if not math.isfinite(real):
            raise ValueError(f"{shown(value)} is not finite")
        return real
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
