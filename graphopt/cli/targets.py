"""`graphopt targets`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from graphopt.cli import console as ui
from graphopt.cli.shared import Json, errors_as_sentences, print_json


@errors_as_sentences
def targets_command(
    name: Annotated[str | None, typer.Argument(help="One target, with its sources.")] = None,
    as_json: Json = False,
) -> None:
    """List the targets and what is known about them."""

    from graphopt.targets import all_targets, broken_targets, get_target

    targets = [get_target(name)] if name is not None else list(all_targets().values())
    if name is None:
        for error in broken_targets().values():
            ui.stderr().print(f"warning: {error}", style="yellow", soft_wrap=True)
    found = [dataclasses.asdict(target) for target in targets]
    if as_json:
        print_json(found)
    else:
        ui.print_targets(ui.stdout(), found, full=name is not None)
