"""`graphopt passes`."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.cli import console as ui
from graphopt.cli.completion import complete_pass
from graphopt.cli.listings import print_pass, print_pass_list
from graphopt.cli.shared import Json, Plugins, add_plugins, errors_as_sentences, print_json
from graphopt.errors import UsageError


@errors_as_sentences
def passes_command(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One pass, with its options and legality rules.", autocompletion=complete_pass
        ),
    ] = None,
    json_schema: Annotated[
        bool,
        typer.Option(
            "--json-schema", help="Print the JSON schema of recipes, with all passes' options."
        ),
    ] = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List the passes, their options and whether they are exact."""
    from graphopt.pass_manager.description import describe_passes

    add_plugins(plugin)
    if json_schema:
        from graphopt.pass_manager.recipe_schema import recipe_schema

        if name is not None:
            raise UsageError(
                "The JSON schema is of all passes together.", f"Leave {name} out; see its $defs."
            )
        print_json(recipe_schema())
        return
    found = describe_passes(name)
    if as_json:
        print_json(found)
    elif name is not None:
        print_pass(ui.stdout(), found[0])
    else:
        print_pass_list(ui.stdout(), found)
