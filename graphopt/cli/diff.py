"""`graphopt diff`."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.cli import console as ui
from graphopt.cli.shared import Json, Remote, errors_as_sentences, print_json


@errors_as_sentences
def diff_command(
    a: Annotated[str, typer.Argument(help="A model or an output folder.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Compare two models: structure, parameters, weights and reports."""
    from graphopt.inspection import diff_models

    with ui.progress_bars() as progress:
        found = diff_models(a, b, trust_remote_code=trust_remote_code, progress=progress)
    if as_json:
        print_json(found)
    else:
        ui.print_diff(ui.stdout(), found)
