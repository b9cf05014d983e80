"""`graphopt targets`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from graphopt.cli import console as ui
from graphopt.cli.completion import complete_target
from graphopt.cli.listings import print_targets
from graphopt.cli.shared import Json, errors_as_sentences, print_json


@errors_as_sentences
def targets_command(
    name: Annotated[
        str | None,
        typer.Argument(help="One target, with its sources.", autocompletion=complete_target),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the targets, what is known about them, and what this machine lacks for them."""

    from graphopt.targets import all_targets, broken_targets, get_target
    from graphopt.targets.here import missing_here

    targets = [get_target(name)] if name is not None else list(all_targets().values())
    if name is None:
        for error in broken_targets().values():
            ui.stderr().print(f"warning: {error}", style="yellow", soft_wrap=True)
    missing = {target.name: missing_here(target) for target in targets}
    if as_json:
        print_json(
            [
                dataclasses.asdict(target)
                | {"missing": [dataclasses.asdict(lack) for lack in missing[target.name]]}
                for target in targets
            ]
        )
    else:
        print_targets(ui.stdout(), targets, missing, full=name is not None)
