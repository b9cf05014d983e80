"""`graphopt train-kv-policy`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli import console as ui
from graphopt.cli.shared import (
    MAX_COUNT,
    MAX_SEED,
    Device,
    Json,
    Remote,
    capture_model,
    errors_as_sentences,
    print_json,
)


@dataclass(frozen=True)
class TrainingFlags:
    """The options of `graphopt train-kv-policy` that numbers are given by."""

    page: Annotated[int, typer.Option(min=1, max=4096, help="Tokens of a page.")] = 16
    seqlen: Annotated[
        int | None,
        typer.Option(min=2, max=MAX_COUNT, help="Tokens of a text; 4096, or what the model takes."),
    ] = None
    windows: Annotated[
        int, typer.Option(min=2, max=1024, help="Texts; the last one is held out.")
    ] = 5
    seconds: Annotated[
        float, typer.Option(min=1, help="Time for training, without recording attention.")
    ] = 600.0
    steps: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Training steps at most.")] = 2000
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of everything random.")] = 0


@errors_as_sentences
def train_kv_policy_command(
    model: Annotated[str, typer.Argument(help="What `graphopt compile` takes.")],
    calib: Annotated[Path, typer.Option(help="Text file to learn from.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, .safetensors.")],
    flags: TrainingFlags,
    device: Device = "auto",
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Train the KV policy 'predictor' on a model's own attention, and compare it with 'ema'.

    The model reads texts once; a small network learns which pages of keys its next step attends to.
    """
    import dataclasses

    from graphopt.errors import SourceError, UsageError

    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"lies in {str(out.parent)!r}, which is no folder"
        raise UsageError(f"{str(out)!r} {what}.", "Name a file in a folder that there is.")
    with ui.progress_bars() as progress:
        progress("opening", 0, 1)
        from graphopt.evaluate.perplexity import read_text
        from graphopt.training.kv_policy_file import file_predictor

        text = read_text(calib)
        program = capture_model(model, trust_remote_code)
        if not program.has_values():
            raise SourceError(
                f"{program.name} is a config without weights, and attends to nothing.",
                "Give a model folder, a .gguf file or 'demo'.",
            )
        progress("opening", 1, 1)
        written = file_predictor(
            program, text, out, device=device, progress=progress, **dataclasses.asdict(flags)
        )
    if as_json:
        print_json(written.figures())
        return
    ui.print_rows(ui.stdout(), written.rows())
    if written.result.shortcoming is not None:
        ui.say_note(written.result.shortcoming)
