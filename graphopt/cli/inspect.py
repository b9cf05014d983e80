"""`graphopt inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.cli import console as ui
from graphopt.cli.shared import (
    MAX_COUNT,
    ConfigOption,
    Json,
    MemoryOption,
    ModelArg,
    Remote,
    capture_model,
    errors_as_sentences,
    memory_bytes,
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
    memory: MemoryOption = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Print a model's program, parameters, and FLOPs and bytes; no weight is read."""
    from graphopt.inspection import inspect_program

    with ui.progress_bars() as progress:
        progress("capture", 0, 1)
        program = capture_model(model_spec(model, config), trust_remote_code)
        progress("capture", 1, 1)
        found = inspect_program(program, batch, seq, past, memory_bytes(memory), progress)
    if as_json:
        print_json(found)
    else:
        ui.print_inspection(ui.stdout(), program, found)
