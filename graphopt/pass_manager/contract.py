"""What a pass is, what it returns, and the registry of passes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from graphopt.errors import UsageError, unknown_name
from graphopt.pass_manager.declarations import Declaration, declarations, declared_in_file
from graphopt.pass_manager.options import default_of, option_types, validated
from graphopt.report.record import Record
from graphopt.support.boundary import users_pass
from graphopt.support.inputs import shown_path
from graphopt.support.per_device import on_device
from graphopt.support.progress import Progress, silent

if TYPE_CHECKING:
    # Passes are listed without torch, which takes seconds to import.
    import torch
    from torch import Tensor

    from graphopt.ir.graph import Program
    from graphopt.ir.vision import PictureTokens
    from graphopt.ir.weights import Producer
    from graphopt.sources.windows import Bos, TokenText


P = TypeVar("P", bound="Pass")
R = TypeVar("R", bound=Record)


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


class Statement(ABC):
    """What a pass states of the program it made, such as which blocks are left."""

    @abstractmethod
    def check(self, before: Program, after: Program) -> str | None:
        """Return, as a clause, what of it does not hold; None where all does."""


@dataclass(frozen=True)
class Statements(Statement):
    """Several statements of one program, all of which hold."""

    parts: tuple[Statement, ...]

    def check(self, before: Program, after: Program) -> str | None:
        return next(filter(None, (part.check(before, after) for part in self.parts)), None)


@dataclass
class PassResult:
    """What a pass did.

    Attributes:
        program: The transformed program; a pass may return the one it was given, changed.
        matched: Places where the pattern of the pass was found.
        changed: Places that were rewritten; 0 promises that the program is as it was.
        skipped: Matched places left alone, with the reason.
        record: What this pass alone tells the report and later passes, of the type that
            `Pass.record` names.
        statement: What holds of the program, for verification to check; None for nothing beyond
            what its structure says.
    """

    program: Program
    matched: int = 0
    changed: int = 0
    skipped: list[Skip] = field(default_factory=list)
    record: Record | None = None
    statement: Statement | None = None


@dataclass(frozen=True)
class Forecast:
    """What a pass will do to a program, as far as its structure tells.

    Attributes:
        what: In a clause: `takes out 8 of 30 blocks`; "" where nothing can be told.
        left: The structure that is left, as near as it can be told; None for that which there was.
        tokens: About how many tokens it runs through the whole model.
        seconds: How long it takes beside that, such as the time that an option gives it.
        memory: Bytes it holds beside the weights of a layer, such as a whole model in fp32.
    """

    what: str = ""
    left: Program | None = None
    tokens: float = 0.0
    seconds: float = 0.0
    memory: int = 0


@dataclass(frozen=True)
class Earlier:
    """A pass that ran.

    Attributes:
        options: The pass itself, which is its options.
        record: What it told.
    """

    options: Pass
    record: Record | None


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
        origin: A hash of all that the program a pass is given comes from: the source with its
            weights, settings, and the passes before it with their options; "" outside a run that
            keeps snapshots.
        dense: The program before the first pass that is not exact: what lossy passes are
            measured against and distil from; None before there is one.
        earlier: The passes that ran before, with what they told; `record` and `options_of` ask
            for one of them by its type.
        encoded: The text in tokens, once a pass asked for windows of it.
        written: Tokens that the model wrote in place of the built-in text, once a pass asked for
            more than it has; see `graphopt.calibration.text.calibration_windows`.
        picture_rows: What ids behind those of the table are looked up as while a pass that is not
            exact runs, [K, D]: the tokens of pictures in the text; None without pictures.
        picture_tokens: Where they stand, for a model whose pictures have positions of three axes or
            are seen both ways.
        begin: Ids that every window begins with; None before a text was cut.
        memory: Bytes of the device's memory by which batches are sized; None for all of it.
    """

    text: str = field(default="", repr=False)
    built_in: bool = False
    tokenizer: Path | None = None
    device: torch.device = field(default_factory=_cpu)
    seed: int = 0
    progress: Progress = silent
    work: Path | None = None
    origin: str = ""
    dense: Program | None = None
    earlier: list[Earlier] = field(default_factory=list)
    encoded: TokenText | None = None
    written: Tensor | None = None
    bos: Bos = "every"
    begin: tuple[int, ...] | None = None
    memory: int | None = None
    picture_rows: Producer | None = None
    picture_tokens: PictureTokens | None = None

    def record(self, of: type[R]) -> R | None:
        """Return the latest record of a type that an earlier pass told; None if none did."""
        found = [ran.record for ran in self.earlier if isinstance(ran.record, of)]
        return found[-1] if found else None

    def options_of(self, of: type[P]) -> P | None:
        """Return the latest earlier pass of a type, which holds its options; None if none ran."""
        found = [ran.options for ran in self.earlier if isinstance(ran.options, of)]
        return found[-1] if found else None


@dataclass
class Pass(ABC):
    """One transformation of a program.

    A subclass is a dataclass whose fields are its options, of types as
    `graphopt.pass_manager.options` says and with a default each, and whose docstring numbers its
    legality rules. Register it with `register_pass`. A pass with a wrong option cannot be made.

    Attributes:
        name: What the command line and recipes call it.
        exact: True where logits must stay equal within rounding; the pipeline checks it.
        reads_weights: True where trained weights are read or made. Passes that don't are run
            on the structure alone for `--dry-run` and before any weight is read.
        requires: What must hold before it: names of passes earlier in the recipe, or names in
            `PROPERTIES`, with `!` in front for "must not hold".
        record: The type of what it tells, with its line for the terminal and its card for the
            page; None for a pass that tells nothing beside what the pipeline measures.
        behind_cache: Whether it stands behind the KV cache in a recipe that does not say, though
            it takes programs without one.
        takes_ranks: Whether it takes programs that are split over several devices.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()
    record: ClassVar[type[Record] | None] = None
    behind_cache: ClassVar[bool] = False
    takes_ranks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given = {option.name: getattr(self, option.name) for option in dataclasses.fields(self)}
        for name, value in validated(type(self), given).items():
            setattr(self, name, value)
        self.check_options()

    def check_options(self) -> None:  # noqa: B027  (a hook: nothing to check by default)
        """Refuse options that do not go together; called when the pass is made.

        Raises:
            UsageError: With the reason and the remedy.
        """

    def check(self, program: Program) -> None:  # noqa: B027  (a hook: nothing to check by default)
        """Refuse a program that this pass can't take, from the structure alone.

        Raises:
            PassError: With the reason and the remedy.
        """

    def forecast(self, program: Program, device: torch.device) -> Forecast:
        """Say what `run` will do and take, for `--dry-run`; no weight may be read.

        Asked of passes that read weights. Others are run.

        Args:
            program: As near as its structure is known; not to be changed.
            device: Where the pass would compute.
        """
        return Forecast()

    @abstractmethod
    def run(self, program: Program, context: Context) -> PassResult:
        """Transform `program`, which the pass may change in place.

        Raises:
            PassError: The pass can't run on this program.
        """

    def milder(self, recipe: Sequence[str]) -> str:
        """Return what a user can do where this pass cost more than wanted, as a clause.

        It stands behind a full stop or an "or", as in "remove fewer blocks (ratio=)".

        Args:
            recipe: Names of all passes of the recipe.
        """
        return f"give {self.name} milder options, or leave it out"

    def values(self, device: torch.device) -> dict[str, Any]:
        """Return every option with its value, the default on a device where none was given."""
        given = {option.name: getattr(self, option.name) for option in dataclasses.fields(self)}
        return {name: on_device(value, device) for name, value in given.items()}

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
    for option in dataclasses.fields(cls):
        default_of(option)
    option_types(cls)
    _PASSES[cls.name] = cls
    return cls


_PLUGINS: dict[str, Declaration] = {}
"""What files that the user named declare, by the name of the pass."""


@cache
def _declarations() -> dict[str, Declaration]:
    """Return what entry points declare, by the name of the pass.

    The passes of this distribution are offered there too: they lie above this package, which does
    not know them.
    """
    return _by_name(declarations())


def _by_name(found: Iterable[Declaration]) -> dict[str, Declaration]:
    known: dict[str, Declaration] = {}
    for declaration in found:
        if declaration.declared is not None:
            known[declaration.declared.name] = declaration
            continue
        before = set(_PASSES)
        declaration.load()
        for name in set(_PASSES) - before:
            known[name] = dataclasses.replace(declaration, declared=_PASSES[name])
    return known


def add_plugin(file: Path) -> None:
    """Make the passes of a Python file known, in this process.

    Raises:
        UsageError: It cannot be read, is no Python, registers no pass, or one of a name that is
            taken.
    """
    found = declared_in_file(file)
    for name, declaration in _by_name(found).items():
        other = {**_declarations(), **_PLUGINS}.get(name)
        if other is not None and other.module != declaration.module:
            owner = other.module if other.file is None else other.file.name
            raise UsageError(
                f"{shown_path(file)} registers a pass {name!r}, and so does {owner}.",
                "Give the pass another name.",
            )
        _PLUGINS[name] = declaration


def declared_passes() -> dict[str, type[Pass]]:
    """Return every known pass by name, as declared: without methods where it is not imported."""
    known = {**_declarations(), **_PLUGINS}
    declared = {n: d.declared for n, d in known.items() if d.declared is not None}
    return {**declared, **_PASSES}


def get_pass(name: str) -> type[Pass]:
    """Return the pass called `name`.

    Raises:
        UsageError: There is none, and the message has the nearest name; or its module cannot be
            imported.
    """
    if name not in _PASSES:
        declaration = _PLUGINS.get(name) or _declarations().get(name)
        if declaration is None:
            error = unknown_name("pass", name, declared_passes())
            raise UsageError(
                error.message, f"{error.remedy} A pass in a file of yours needs --plugin FILE.py."
            )
        declaration.load()
    return _PASSES[name]


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """Return the pass called `name` with options.

    Args:
        options: Values of the right type, or their text.

    Raises:
        UsageError: Unknown pass or option, or a value of the wrong type or out of range.
    """
    cls = get_pass(name)
    known = {option.name for option in dataclasses.fields(cls)}
    for key in options:
        if key not in known:
            if not known:
                raise UsageError(f"Pass {name!r} has no option {key!r}.", "It takes no options.")
            raise unknown_name(f"option of pass {name!r},", key, known)
    with users_pass(name, cls.__module__):
        return cls(**options)
