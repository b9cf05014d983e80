"""`graphopt inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.cli import console as ui
from graphopt.cli.shared import (
    MAX_COUNT,
    ConfigOption,
    Json,
    ModelArg,
    Remote,
    capture_model,
    errors_as_sentences,
    model_spec,
    print_json,
)


@errors_as_sentences
def inspect_command(
    model: ModelArg = None,
    config: ConfigOption = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="B, sequences.")] = 1,
    seq: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="S, tokens of one step.")] = 128,
    past: Annotated[int, typer.Option(min=0, max=MAX_COUNT, help="P, tokens in the KV cache.")] = 0,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Print a model's program, parameters, and FLOPs and bytes; no weight is read."""
    from graphopt.inspection import inspect_program

    with ui.progress_bars() as progress:
        progress("capture", 0, 1)
        program = capture_model(model_spec(model, config), trust_remote_code)
        found = inspect_program(program, batch, seq, past)
        progress("capture", 1, 1)
    if as_json:
        print_json(found)
    else:
        ui.print_inspection(ui.stdout(), program, found)
