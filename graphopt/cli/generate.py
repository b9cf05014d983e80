"""`graphopt generate`: one answer, the answers to a file of prompts, or a chat in the terminal."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import console as ui
from graphopt.cli import keyboard
from graphopt.cli.shared import (
    MAX_COUNT,
    MAX_SEED,
    Backend,
    Device,
    Json,
    Remote,
    backend_named,
    errors_as_sentences,
    print_json,
)
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.generate import Conversation


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are chosen; what is not given is as the model's generation_config.json says."""

    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the likeliest token each time.")
    ] = False
    temperature: Annotated[
        float | None,
        typer.Option(help="Draw tokens, with logits divided by it; 0 for greedy decoding."),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(max=MAX_COUNT, help="Draw from so many of the likeliest; 0 for all."),
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest, up to this sum.")
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Draw from those at least this share as likely as the likeliest."),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1, tokens that are in the text become less likely."),
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampling.")] = 0


@errors_as_sentences
def generate_command(
    model: Annotated[str, typer.Argument(help="A model or an output folder.")],
    prompt: Annotated[
        str | None,
        typer.Option(help="What to answer or to continue; without it, a chat or what is piped in."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts, one a line; as .jsonl a JSON string in each."),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture that the prompt is about; several may be given, in order."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(max=MAX_COUNT, help="Tokens at most.")] = 256,
    *,
    sampling: SamplingFlags,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt, without the chat template.")
    ] = False,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Keep keys and values in host memory, where a package for a GPU has a KV policy.",
        ),
    ] = False,
    backend: Backend = "auto",
    device: Device = "auto",
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Answer a prompt, printing tokens as they come; without one, chat.

    How tokens are chosen is as the model's generation_config.json says, unless an option says it.
    """
    options: dict[str, Any] = dataclasses.asdict(sampling)
    chats = prompt is None and prompts is None and keyboard.stdin().isatty()
    if prompt is not None and prompts is not None:
        raise UsageError("Both --prompt and --prompts are given.", "Give one of them.")
    if image and (prompt is None or system is not None or raw or offload):
        raise UsageError(
            "--image goes with one --prompt, and with none of --prompts, --system, --raw and "
            "--offload.",
            "Give --prompt TEXT; what the chat template puts around it is the processor's.",
        )
    if chats and as_json:
        raise UsageError("A chat is no JSON.", "Give --prompt or --prompts, or leave --json out.")
    with ui.progress_bars() as progress:
        progress("opening", 0, 1)
        from graphopt.backends.opening import open_language_model
        from graphopt.execute.language_model import load_tokenizer
        from graphopt.generate import Conversation, Sampling
        from graphopt.generate.decoding import check_options
        from graphopt.sources.generation import GenerationSettings, not_applied

        check_options(max_new_tokens, Sampling.of(GenerationSettings(), **options))
        asked = [] if chats else _asked(prompt, prompts)
        if image:
            _see(model, asked[0], image, max_new_tokens, options, backend, device, as_json,
                 trust_remote_code)  # fmt: skip
            return
        opened = open_language_model(
            model,
            backend_named(backend),
            device=device,
            trust_remote_code=trust_remote_code,
            offload=offload,
        )
        conversation = Conversation(
            opened,
            load_tokenizer(opened),
            system=system,
            raw=raw,
            max_new_tokens=max_new_tokens,
            sampling=Sampling.of(opened.settings, **options),
            say=ui.say_note,
        )
        progress("opening", 1, 1)
    ignored = not_applied(opened.generation)
    if not as_json:
        also = f"; not applied: {', '.join(ignored)}" if ignored else ""
        ui.say_note(f"{opened.placement}; {conversation.sampling}{also}")
    if chats:
        from graphopt.cli.chat import chat

        chat(conversation)
        return
    answers = list(_answers(conversation, asked, named=prompts is not None, quiet=as_json))
    if as_json:
        about = {
            "model": model,
            "backend": opened.backend,
            "device": str(opened.device),
            "sampling": dataclasses.asdict(conversation.sampling),
            "not_applied": ignored,
        }
        print_json({**about, **({"answers": answers} if prompts is not None else answers[0])})


def _see(
    model: str,
    prompt: str,
    images: list[Path],
    max_new_tokens: int,
    options: dict[str, Any],
    backend: str,
    device: str,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Answer a prompt about pictures."""
    from graphopt.cli.pictures import answer_pieces, open_sighted
    from graphopt.generate import Sampling
    from graphopt.support.inputs import open_regular

    for image in images:  # which are wrong before the model is opened
        with open_regular(image):
            pass
    opened, processor = open_sighted(
        model, backend_named(backend), device, trust_remote_code=trust_remote_code
    )
    sampling = Sampling.of(opened.settings, **options)
    if not as_json:
        ui.say_note(f"{opened.placement}; {sampling}")
    start = time.perf_counter()
    said: list[str] = []
    for piece in answer_pieces(opened, processor, prompt, images, max_new_tokens, sampling):
        said.append(piece)
        if not as_json:
            ui.write_piece(piece)
    if not as_json:
        ui.write_piece("\n")
        return
    print_json(
        {
            "model": model,
            "backend": opened.backend,
            "device": str(opened.device),
            "sampling": dataclasses.asdict(sampling),
            "prompt": prompt,
            "images": [str(path) for path in images],
            "text": "".join(said),
            "seconds": time.perf_counter() - start,
        }
    )


def _asked(prompt: str | None, prompts: Path | None) -> list[str]:
    """Return the prompts of a command that is no chat.

    Raises:
        UsageError: There is none.
        SourceError: The file cannot be read.
    """
    from graphopt.generate import read_prompts

    if prompts is not None:
        return read_prompts(prompts)
    if prompt is None:
        ui.say_note("The prompt is read from stdin.")
        prompt = keyboard.stdin().read().removesuffix("\n")
        if not prompt:
            raise UsageError(
                "There is no prompt: stdin is empty, and no terminal to chat in.",
                "Give --prompt TEXT, --prompts FILE, or the prompt on stdin.",
            )
    if not prompt:
        raise UsageError("The prompt is empty.", "Give at least one word.")
    return [prompt]


def _answers(
    conversation: Conversation, prompts: list[str], *, named: bool, quiet: bool
) -> Iterator[dict[str, Any]]:
    """Answer prompts, each in a conversation of its own, and print what is not to be JSON.

    Args:
        named: Say each prompt in front of its answer.
        quiet: Print nothing.
    """
    for number, prompt in enumerate(prompts):
        conversation.reset()
        if named and not quiet:
            if number:
                sys.stdout.write("\n")
                sys.stdout.flush()
            ui.say_note(f"> {prompt}")
        start = time.perf_counter()
        pieces: list[str] = []
        for piece in conversation.answer(prompt):
            pieces.append(piece)
            if not quiet:
                ui.write_piece(piece)
        if not quiet:
            ui.write_piece("\n")
            if not "".join(pieces).strip():
                ui.say_note("(the answer is empty)")
        seconds = time.perf_counter() - start
        yield {"prompt": prompt, "text": "".join(pieces), "seconds": seconds}
