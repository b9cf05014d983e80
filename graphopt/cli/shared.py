"""What commands have in common: errors as sentences, and options that several take."""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import click
import typer

from graphopt.cli import console as ui
from graphopt.cli.process import CommandProcess
from graphopt.errors import GraphoptError, UsageError, first_line
from graphopt.support.boundary import BUG_CODE, REPORT_BUG, out_of_memory
from graphopt.support.quantities import parse_bytes

if TYPE_CHECKING:
    from graphopt.ir.graph import Program

INTERRUPTED = 130

MAX_SEED = 2**63 - 1
MAX_COUNT = 2**31 - 1
MAX_RANKS = 4096
"""Bounds of numbers on the command line: what generators, and sizes of tensors, take."""


Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]


def errors_as_sentences(command: Callable[..., None]) -> Callable[..., None]:
    """Turn every error into one sentence on stderr and an exit code; adds the option --debug.

    A parameter whose type is a dataclass stands for its fields, an option of the command each.
    """

    @functools.wraps(command)
    def wrapped(**kwargs: Any) -> None:
        debug = kwargs.pop("debug", False)
        process = CommandProcess(command.__name__, kwargs)
        logged = logging.root.manager.disable
        if not debug:
            # torch and transformers log tracebacks of what they then raise.
            logging.disable(logging.ERROR)
        try:
            _refuse_bytes(kwargs)
            process.run(lambda: command(**_gathered(command, kwargs)))
        except typer.Exit as end:
            if end.exit_code:
                process.tell("Interrupted." if end.exit_code == INTERRUPTED else "It ended.", end)
            raise
        except (typer.Abort, click.ClickException):
            raise
        except KeyboardInterrupt:
            process.say_error("Interrupted; nothing was left half-written.", "", INTERRUPTED)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(1) from None
        except Exception as error:
            if debug:
                ui.say_traceback()
            message, remedy, code = describe_error(error, command.__name__)
            process.say_error(message, remedy, code)
            raise typer.Exit(code) from None
        finally:
            process.close()
            logging.disable(logged)

    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False)
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in (*_expanded(command), option.replace(annotation=Debug))
    ]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped


def _expanded(command: Callable[..., None]) -> Iterator[inspect.Parameter]:
    """Yield a command's parameters, with the fields of a dataclass in the place of one."""
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            yield parameter
            continue
        hints = get_type_hints(parameter.annotation, include_extras=True)
        for field in dataclasses.fields(parameter.annotation):
            default = field.default
            if default is dataclasses.MISSING:
                default = inspect.Parameter.empty
            yield parameter.replace(name=field.name, annotation=hints[field.name], default=default)


def _gathered(command: Callable[..., None], given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a command, with an object for the fields of a dataclass."""
    arguments = dict(given)
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            names = [field.name for field in dataclasses.fields(parameter.annotation)]
            made = cast(Callable[..., Any], parameter.annotation)
            arguments[parameter.name] = made(**{name: arguments.pop(name) for name in names})
    return arguments


def _refuse_bytes(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments whose bytes are no text: they could be neither printed nor written."""
    for name, given in arguments.items():
        for value in given if isinstance(given, list | tuple) else [given]:
            if isinstance(value, str | Path) and not str(value).isascii():
                try:
                    str(value).encode()
                except UnicodeEncodeError:
                    own = name.replace("_", "-")
                    raise UsageError(
                        f"The argument {own} is not UTF-8 text: {str(value)!a:.100}.",
                        "Give it in UTF-8, or rename the file.",
                    ) from None


_LESS_MEMORY = {
    "compile_command": "Give passes that calibrate smaller windows= or seqlen=, a shorter --calib "
    "text, or --no-verify.",
    "eval_command": "Give a smaller --seqlen, or a shorter text.",
    "generate_command": "Give a shorter --prompt or smaller --max-new-tokens.",
}
"""What to say where memory does not suffice: options, by command, that need less."""


def describe_error(error: Exception, command: str) -> tuple[str, str, int]:
    """Return the sentence, the remedy and the exit code of an error that ends a command."""
    short_of = out_of_memory(error)
    if short_of is not None and not (isinstance(error, GraphoptError) and "memory" in str(error)):
        least = _LESS_MEMORY.get(command, "Give a smaller model.")
        return f"The memory of {short_of} does not suffice.", least, 1
    if isinstance(error, GraphoptError):
        return error.message, error.remedy, error.exit_code
    if isinstance(error, OSError):
        where = f" at {error.filename}" if error.filename else ""
        if error.errno == errno.ENOSPC:
            return f"The disk is full{where}.", "Free some space and run again with --resume.", 1
        said = f"A file operation failed{where}: {error.strerror or error}."
        return said, _of_a_dangling_link(error), 1
    said = f"{type(error).__name__}: {first_line(error)}"
    return f"This is a bug in graphopt: {said}.", REPORT_BUG, BUG_CODE


def _of_a_dangling_link(error: OSError) -> str:
    """Return what to do where the file is a link that leads nowhere; else nothing."""
    path = error.filename
    if error.errno != errno.ENOENT or not isinstance(path, str) or not os.path.islink(path):
        return ""
    return (
        "It is a link that leads nowhere. Where graphopt is installed as editable, install it "
        "again after a file was renamed or removed."
    )


def print_json(data: Any) -> None:
    """Write data as JSON on stdout."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]

Remote = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code of the checkpoint run.")
]

ModelArg = Annotated[
    str | None,
    typer.Argument(
        help="Hugging Face id or folder, .gguf file, 'demo', or an output folder of graphopt."
    ),
]

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="A config.json instead of a model: structure without weights."),
]

Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin", help="Python file with passes of your own, which is run; may be repeated."
    ),
]

BosOption = Annotated[
    str,
    typer.Option(
        help="Which windows of text begin with the token that the tokenizer puts before a text: "
        "every, or, as in papers, the first."
    ),
]

MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Memory of a GPU, such as 24GB: say which batches and lengths fit it.",
    ),
]

RanksOption = Annotated[
    int | None,
    typer.Option(
        "--ranks", "--nproc", min=1, max=MAX_RANKS,
        help="Processes that share the work, each on a GPU of its own; by default one.",
    ),
]  # fmt: skip

LauncherOption = Annotated[
    str | None,
    typer.Option(
        help="What starts the ranks: torchrun, on this host, or ray, on the Ray cluster that "
        "runs; as many as there are GPUs, unless --ranks says."
    ),
]

Device = Annotated[
    str,
    typer.Option(
        help="Where to run, such as cuda; auto takes a GPU where there is one and it helps."
    ),
]

Backend = Annotated[
    str, typer.Option(help="auto, program, torch or onnx: which form of an artifact to run.")
]


def model_spec(model: str | None, config: Path | None) -> str:
    """Return what `open_model` takes for MODEL or --config.

    Raises:
        UsageError: Neither or both are given.
    """
    if (model is None) == (config is None):
        raise UsageError("Name one model.", "Give MODEL, or --config FILE for a bare config.")
    return f"config:{config}" if config is not None else str(model)


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, in front of what takes long.

    Raises:
        UsageError: It is a folder, or there is no folder for it in which one may write.
    """
    above = path.absolute().parent
    if path.is_dir():
        raise UsageError(f"{path} is a folder.", "Name a file.")
    if not above.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {above}.", "Make it first.")
    if not os.access(path if path.exists() else above, os.W_OK):
        raise UsageError(f"{path} cannot be written.", "Name a file elsewhere.")


def memory_bytes(text: str | None) -> int | None:
    """Return the bytes of --memory; None where it was not given.

    Raises:
        UsageError: The text is no size.
    """
    return None if text is None else parse_bytes("--memory", text)


def add_plugins(files: Sequence[Path] | None) -> None:
    """Make the passes of the files known that --plugin names.

    Raises:
        UsageError: A file is no Python, or registers no pass of a name that is free.
    """
    from graphopt.pass_manager.contract import add_plugin

    for file in files or ():
        add_plugin(file)


def capture_model(spec: str, trust_remote_code: bool) -> Program:
    """Return the program of a model; torch is imported here, not for `--help`."""
    from graphopt.capture import capture

    return capture(spec, trust_remote_code=trust_remote_code)


def backend_named(name: str) -> Any:
    """Return the name of a backend as it was given.

    Raises:
        UsageError: There is none of that name; the message has the nearest one.
    """
    from graphopt.errors import unknown_name

    known = ("auto", "program", "torch", "onnx")
    if name not in known:
        raise unknown_name("backend", name, known)
    return name
