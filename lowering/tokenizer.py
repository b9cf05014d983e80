"""Writing a model's tokenizer, and how it generates, into an artifact."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from graphopt.errors import SourceError
from graphopt.ir.graph import Program
from graphopt.sources.generation import GENERATION_NAME
from graphopt.sources.processor import read_processor
from graphopt.sources.tokenizer import OTHER_FILES, PROCESSOR_FILES, tokenizer_files, working
from graphopt.sources.windows import prompt_ids, special_ends, tokenizer_at

TOKENIZER_NAME = "tokenizer.json"
TEMPLATE_NAME = "chat_template.jinja"

_SAMPLE = "The harbour was quiet on the morning the survey began; 2 engineers carried a tripod."


def write_generation(program: Program, folder: Path) -> list[Path]:
    """Write how text is to be generated as generation_config.json.

    Returns:
        The file; none where the program says nothing.
    """
    if not program.generation:
        return []
    path = folder / GENERATION_NAME
    path.write_text(json.dumps(program.generation, indent=2) + "\n", encoding="utf-8")
    return [path]


def run_lines(program: Program) -> list[str]:
    """Return the lines that run an output folder by graphopt itself, whatever is in it.

    Without a tokenizer there is nothing to put a prompt into.
    """
    return [] if program.tokenizer is None else ["graphopt generate {out} --prompt 'Hello'"]


def picture_prompt(folder: Path, names: Collection[str]) -> str | None:
    """Return a prompt about one picture; None where nothing says how a prompt is put.

    Args:
        folder: Where a processor is read from.
        names: Of the files that came with the tokenizer.
    """
    prompt = "What is in the picture?"
    if not set(PROCESSOR_FILES).intersection(names):
        return None
    if TEMPLATE_NAME in names:
        return prompt
    try:
        return f"{read_processor(folder).image_token}{prompt}"
    except (SourceError, AttributeError):
        return None  # what stands in a prompt for a picture is the processor's to say


def picture_lines(command: str, prompt: str | None, needs: str) -> list[str]:
    """Return the line that asks about a picture, where there is a prompt for it.

    Args:
        command: What runs, without the prompt.
        needs: Packages that it needs besides.
    """
    if prompt is None:
        return []
    asked = f"{command} --prompt {shlex.quote(prompt)} --image picture.png"
    return [f"{asked}   # a picture of yours; needs {needs} besides"]


def copy_tokenizer(program: Program, folder: Path) -> list[Path]:
    """Copy the tokenizer files of a program into `folder`.

    Returns:
        The files written; none where the program has no tokenizer.

    Raises:
        SourceError: One of them is a link out of the tokenizer's folder.
    """
    if program.tokenizer is None:
        return []
    written: list[Path] = []
    for name, source in tokenizer_files(Path(program.tokenizer)):
        (folder / name).parent.mkdir(exist_ok=True)
        written.append(Path(shutil.copyfile(source, folder / name)))
    return written


def write_tokenizer(program: Program, folder: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Write the tokenizer of a program into `folder`, for runtimes without transformers.

    They read tokenizer.json alone, while transformers changes what it says by flags and classes.
    So tokenizer.json is made to say what transformers does with a text that is to be continued:
    to put before it what belongs there, and nothing behind it. A chat template gets a file of its
    own.

    Returns:
        The files written, and notes on what could not be.
    """
    files = copy_tokenizer(program, folder)
    if not files:
        return [], []
    path = folder / TOKENIZER_NAME
    try:
        tokenizer = tokenizer_at(Path(program.tokenizer or ""), program.name)
        with working(tokenizer.name_or_path, "be put into tokenizer.json", OTHER_FILES):
            saved = _for_prompts(tokenizer, path)
    except SourceError as error:
        return files, [("tokenizer", f"its files are copied as they are: {error.message}")]
    if saved is not None:
        saved.save(str(path))
    template = chat_template(tokenizer)
    if template is not None:
        (folder / TEMPLATE_NAME).write_text(template, encoding="utf-8", newline="")
    _without_null_template(folder / "tokenizer_config.json")
    notes = []
    if not path.exists():
        notes.append(("tokenizer", "no tokenizer.json can be made of it, so only token ids work"))
    new = [folder / name for name in (TOKENIZER_NAME, TEMPLATE_NAME) if (folder / name).exists()]
    return list(dict.fromkeys([*files, *new])), notes


def _without_null_template(path: Path) -> None:
    """Take out a template that is stated as null, where onnxruntime-genai expects text."""
    if not path.exists():
        return
    data = json.loads(path.read_text(encoding="utf-8"))
    if "chat_template" in data and data["chat_template"] is None:
        del data["chat_template"]
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def chat_template(tokenizer: Any) -> str | None:
    """Return the chat template that a plain conversation gets; None where there is none."""
    try:
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    except ValueError:  # there are several, and none is the default
        return None
    return template if isinstance(template, str) else None


def _for_prompts(tokenizer: Any, path: Path) -> Any:
    """Return what tokenizer.json has to hold, or None where it already does, or nothing can."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    begin, _ = special_ends(tokenizer)
    wanted = prompt_ids(tokenizer, _SAMPLE)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    texts = [path.read_text(encoding="utf-8")] if path.exists() else []
    if texts and Tokenizer.from_str(texts[0]).encode(_SAMPLE).ids == wanted:
        return None
    if isinstance(backend, Tokenizer):
        texts.append(backend.to_str())
    tokens = tokenizer.convert_ids_to_tokens(begin)
    for text in texts:
        made = Tokenizer.from_str(text)
        made.no_padding()
        made.no_truncation()
        made.post_processor = TemplateProcessing(
            single=[*tokens, "$A"], special_tokens=list(zip(tokens, begin, strict=True))
        )
        if made.encode(_SAMPLE).ids == wanted:
            return made
    return None
