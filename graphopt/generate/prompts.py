"""Prompts as token ids: plain, or put into the model's chat template; and files of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import SourceError, UsageError, first_line
from graphopt.runtime.chat import chat_text
from graphopt.sources.tokenizer import encode
from graphopt.sources.windows import prompt_ids
from graphopt.support.inputs import parse_json, read_utf8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""One turn of a conversation: its `role` (system, user or assistant) and its `content`."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool = False
) -> list[int]:
    """Return the tokens of a prompt, put into the chat template where the tokenizer has one.

    A template writes the special tokens itself, the first of a text too. Without one, the text
    begins with what the tokenizer puts before it.

    Args:
        raw: Continue the text as it is, without the template.

    Raises:
        UsageError: The prompt has no tokens, or is no text.
        SourceError: The template cannot be applied.
    """
    if tokenizer.chat_template and not raw:
        return encode_messages(tokenizer, [{"role": "user", "content": prompt}])
    check_text(prompt)
    ids = prompt_ids(tokenizer, prompt)
    if not ids:
        raise _empty_prompt()
    return ids


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the tokens of a conversation in the chat template, with the beginning of an answer.

    Args:
        tokenizer: One with a chat template.
        messages: The last one is the prompt.

    Raises:
        UsageError: The prompt has no tokens, or a message is no text.
        SourceError: The template cannot be applied.
    """
    for message in messages:
        if message["role"] != "assistant":  # an answer may be empty
            check_text(message["content"])
    try:
        template = tokenizer.get_chat_template()
        text = chat_text(template, messages, tokenizer.special_tokens_map)
    except ValueError as error:
        remedy = "Pass --raw to continue the prompt without it."
        if messages[0]["role"] == "system":
            remedy = f"Leave --system out where the model knows no system prompt. {remedy}"
        raise SourceError(
            f"The chat template cannot be applied: {first_line(error)}.", remedy
        ) from error
    ids = encode(tokenizer, text, special=False)
    if not ids:
        raise _empty_prompt()
    return ids


def check_text(prompt: str) -> None:
    """Refuse what cannot be encoded.

    Raises:
        UsageError: The prompt is empty, or holds halves of characters.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("The prompt is not valid Unicode.", "Give it in UTF-8.") from error
    if not prompt:
        raise _empty_prompt()


def _empty_prompt() -> UsageError:
    return UsageError("The prompt is empty.", "Give at least one word.")


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file, one a line; empty lines are none.

    A file whose name ends in .jsonl has a JSON string in each line, or an object whose `prompt`
    is one: so a prompt can have lines of its own.

    Raises:
        SourceError: The file cannot be read, holds no prompt, or a line is no such JSON.
    """
    prompts = []
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        prompts.append(_json_prompt(line, path, number) if path.suffix == ".jsonl" else line)
    if not prompts:
        raise SourceError(f"{path} is empty.", "Give a file with one prompt a line.")
    return prompts


def _json_prompt(line: str, path: Path, number: int) -> str:
    remedy = 'Each line is a JSON string, or {"prompt": ...}.'
    where = f"{path}, line {number}"
    data = parse_json(line.encode(), where, remedy=remedy, one_line=True)
    prompt = data.get("prompt") if isinstance(data, dict) else data
    if not isinstance(prompt, str) or not prompt:
        raise SourceError(f"{where}, holds no prompt.", remedy)
    return prompt
