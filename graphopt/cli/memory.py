"""`graphopt memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.memory_plan import plan_file
from graphopt.cli.shared import MAX_COUNT, Json, errors_as_sentences


@errors_as_sentences
def memory_command(
    plan: Annotated[
        Path, typer.Option(help="CSV file with columns id, lower, upper, size: plan offsets.")
    ],
    capacity: Annotated[
        int | None, typer.Option(min=0, help="Bytes that suffice; by default the fewest.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where to write the rows with offsets.")
    ] = None,
    seconds: Annotated[float, typer.Option(max=MAX_COUNT, help="How long to look.")] = 60.0,
    as_json: Json = False,
) -> None:
    """Plan offsets in one arena for blocks of known lifetimes."""
    raise typer.Exit(plan_file(plan, capacity, out, seconds, as_json))
