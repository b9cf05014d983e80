"""`graphopt generate`."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer

from graphopt.cli import console as ui
from graphopt.cli.shared import (
    MAX_COUNT,
    MAX_SEED,
    Backend,
    Json,
    Remote,
    backend_named,
    errors_as_sentences,
    print_json,
)
from graphopt.errors import UsageError


@errors_as_sentences
def generate_command(
    model: Annotated[str, typer.Argument(help="A model or an output folder.")],
    prompt: Annotated[str, typer.Option(help="What to answer or to continue.")],
    max_new_tokens: Annotated[int, typer.Option(max=MAX_COUNT, help="Tokens at most.")] = 256,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the likeliest token each time.")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(help="Draw tokens, with logits divided by it; 0 for greedy decoding."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(max=MAX_COUNT, help="Draw from so many of the likeliest; 0 for all."),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest, up to this sum.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampling.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt, without the chat template.")
    ] = False,
    backend: Backend = "auto",
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Answer a prompt, printing tokens as they come.

    What is not given here is as the model's generation_config.json says.
    """
    import time

    options: dict[str, Any] = {
        "greedy": greedy, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    with ui.progress_bars() as progress:
        progress("opening", 0, 1)
        from graphopt.backends.opening import open_language_model
        from graphopt.execute.language_model import load_tokenizer
        from graphopt.generate import Sampling, check_options, generate
        from graphopt.sources.generation import GenerationSettings, not_applied

        check_options(max_new_tokens, Sampling.of(GenerationSettings(), **options))
        if not prompt:
            raise UsageError("The prompt is empty.", "Give at least one word.")
        opened = open_language_model(
            model, backend_named(backend), trust_remote_code=trust_remote_code
        )
        tokenizer = load_tokenizer(opened)
        sampling = Sampling.of(opened.settings, **options)
        progress("opening", 1, 1)
    ignored = not_applied(opened.generation)
    if not as_json:
        also = f"; not applied: {', '.join(ignored)}" if ignored else ""
        ui.stderr().print(f"{sampling}{also}", style="dim", highlight=False, markup=False)
    start = time.perf_counter()
    pieces: list[str] = []
    for piece in generate(
        opened,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        raw=raw,
        say=ui.say_note,
        **options,
    ):
        pieces.append(piece)
        if not as_json:
            ui.write_piece(piece)
    if as_json:
        seconds = time.perf_counter() - start
        found = {"model": model, "backend": opened.backend, "prompt": prompt}
        made = {"text": "".join(pieces), "seconds": seconds}
        how = {"sampling": dataclasses.asdict(sampling), "not_applied": ignored}
        print_json({**found, **made, **how})
    else:
        sys.stdout.write("\n")
