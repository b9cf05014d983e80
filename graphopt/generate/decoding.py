"""Tokens one by one, each chosen by the logits of the text so far, and the text they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from graphopt.errors import UsageError
from graphopt.execute.language_model import LanguageModel
from graphopt.generate.sampling import GREEDY, Sampling, penalise, pick_token
from graphopt.generate.text_reader import TextReader
from graphopt.sources.tokenizer import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"


@dataclass
class PieceDecoder:
    """Turns tokens into text as they come; a character split over tokens waits for its end.

    A token's text may depend on the one before it (a leading space, say), so the tokens of the
    last piece are decoded together with the new ones.
    """

    tokenizer: Any
    _ids: list[int] = field(default_factory=list)
    _context: int = 0
    _done: int = 0

    def add(self, token: int) -> str:
        """Return the text that `token` completes; "" while a character is unfinished."""
        self._ids.append(token)
        return self._piece(final=False)

    def finish(self) -> str:
        """Return what is left, unfinished characters as U+FFFD."""
        return self._piece(final=True)

    def _piece(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._done])
        text = self._decode(self._ids[self._context :])
        if not final and text.endswith(REPLACEMENT):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return decode(self.tokenizer, ids)


def end_tokens(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens at which generation stops.

    They are those of the model's generation config, where it states some; otherwise those of its
    config and the tokenizer's.

    Raises:
        SourceError: An entry of the model's configs is of a wrong type or out of range.
    """
    ends = set(model.settings.eos_token_id)
    if model.generation.get("eos_token_id") is None and tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    return ends


def check_options(max_new_tokens: int, sampling: Sampling) -> None:
    """Refuse options of generation that make no sense, before a model is opened.

    Raises:
        UsageError: One is out of range.
    """
    sampling.check()
    if max_new_tokens < 1:
        raise UsageError(f"Generation needs at least one new token, not {max_new_tokens}.")


def generate_ids(
    model: LanguageModel,
    prompt: list[int],
    *,
    stop: set[int],
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    say: Callable[[str], None] = lambda _: None,
    reader: TextReader | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt`, without the one that ends the text.

    Args:
        prompt: Token ids.
        stop: Tokens that end the text.
        max_new_tokens: How many at most; fewer where the model's positions end.
        sampling: How each is chosen; the likeliest by default.
        say: Told in a sentence, first of all, where the model's positions end sooner.
        reader: Of the model, with the cache of what it read before; a new one by default.
        generator: What tokens are drawn with; by default a new one with the sampling's seed.

    Raises:
        UsageError: An option is out of range, or the prompt leaves no position free.
    """
    check_options(max_new_tokens, sampling)
    model.check_ids(prompt)
    if model.positions is not None:
        if len(prompt) >= model.positions:
            raise UsageError(
                f"The prompt has {len(prompt)} tokens, and {model.name} takes texts of "
                f"{model.positions}.",
                "Shorten it; or compile the model with a larger --max-length, which rotary "
                "positions allow.",
            )
        room = model.positions - len(prompt)
        if room < max_new_tokens:
            say(
                f"{model.name} takes texts of {model.positions} tokens, and the prompt has "
                f"{len(prompt)}: at most {room} follow."
            )
        max_new_tokens = min(max_new_tokens, room)
    if generator is None:
        generator = torch.Generator().manual_seed(sampling.seed)
    reader = TextReader(model) if reader is None else reader
    return _generate(reader, prompt, stop, max_new_tokens, sampling, generator)


def _generate(
    reader: TextReader,
    prompt: Sequence[int],
    stop: set[int],
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> Iterator[int]:
    text, room = list(prompt), len(prompt) + max_new_tokens
    for _ in range(max_new_tokens):
        scores = reader.next_logits(text, room)
        if sampling.repetition_penalty != 1:
            scores = penalise(scores, sampling.repetition_penalty, torch.tensor(text))
        token = pick_token(scores, sampling, generator)
        if token in stop:
            return
        yield token
        text.append(token)


def pieces(tokens: Iterator[int], decoder: PieceDecoder) -> Iterator[str]:
    """Yield the text of tokens as it comes, in whole characters."""
    for token in tokens:
        piece = decoder.add(token)
        if piece:
            yield piece
    rest = decoder.finish()
    if rest:
        yield rest
