"""The command line: its commands, a file each, and the process that runs one.

Torch and transformers take seconds to import: what needs them is imported by the commands that do.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import Annotated, NoReturn

import typer

from graphopt.cli import console as ui
from graphopt.cli import keyboard
from graphopt.cli.compile import compile_command
from graphopt.cli.diff import diff_command
from graphopt.cli.evaluate import eval_command
from graphopt.cli.generate import generate_command
from graphopt.cli.inspect import inspect_command
from graphopt.cli.measure_host import measure_host_command
from graphopt.cli.memory import memory_command
from graphopt.cli.passes import passes_command
from graphopt.cli.plan_attention import plan_attention_command
from graphopt.cli.targets import targets_command
from graphopt.cli.train_kv_policy import train_kv_policy_command

app = typer.Typer(
    name="graphopt",
    help="Capture a language model once, transform it with passes that check themselves, and "
    "emit a model that runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for _name, _command in (
    ("compile", compile_command),
    ("inspect", inspect_command),
    ("eval", eval_command),
    ("generate", generate_command),
    ("memory", memory_command),
    ("passes", passes_command),
    ("targets", targets_command),
    ("plan-attention", plan_attention_command),
    ("train-kv-policy", train_kv_policy_command),
    ("measure-host", measure_host_command),
    ("diff", diff_command),
):
    app.command(_name)(_command)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from graphopt import __version__

        typer.echo(f"graphopt {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line and end the process."""
    # A tracer makes millions of small objects that live as long as the process. Looking for
    # cycles among them, while they are made and once more at exit, takes seconds.
    gc.set_threshold(100_000, 20, 100)
    ui.keep_logs_plain()
    keyboard.hide_stdin()
    try:
        app()
        code: object = 0
    except SystemExit as end:
        code = end.code
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
