"""A conversation with a model: turns in its chat template, and the KV cache of those so far."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from graphopt.errors import UsageError
from graphopt.execute.language_model import LanguageModel
from graphopt.generate.decoding import (
    PieceDecoder,
    check_options,
    end_tokens,
    generate_ids,
    pieces,
)
from graphopt.generate.prompts import Message, encode_messages, encode_prompt
from graphopt.generate.sampling import GREEDY, Sampling
from graphopt.generate.text_reader import TextReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conversation:
    """A conversation of several turns.

    Where the model has no chat template there are no turns: each prompt is continued by itself.

    Args:
        tokenizer: The model's.
        system: The system prompt; none by default.
        raw: Leave the chat template out.
        max_new_tokens: Of one answer, at most.
        sampling: How tokens are chosen. One generator draws those of all answers.
        say: Told in a sentence where the model's positions end sooner.

    Attributes:
        has_turns: Whether an answer knows what was said before.
        messages: What was said so far, the system prompt first.
        sampling: As above.

    Raises:
        UsageError: An option is out of range, or there is a system prompt and no template.
        SourceError: The model's settings are malformed.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        raw: bool = False,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        check_options(max_new_tokens, sampling)
        self.has_turns = bool(tokenizer.chat_template) and not raw
        if system and not self.has_turns:
            why = "--raw leaves it out" if raw else f"{model.name} has none"
            raise UsageError(
                f"A system prompt has its place in a chat template, and {why}.",
                "Leave --system out, or put its text into the prompt.",
            )
        self.messages: list[Message] = []
        self._model, self._tokenizer, self._system = model, tokenizer, system
        self._max_new_tokens, self.sampling, self._say = max_new_tokens, sampling, say
        self._stop = end_tokens(model, tokenizer)
        self._reader = TextReader(model)
        self._generator = torch.Generator()
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt; the next answer is drawn as a first one."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        self._generator.manual_seed(self.sampling.seed)

    def answer(self, prompt: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yield the answer to a prompt, piece by piece, in whole characters.

        Prompt and answer belong to the conversation once it ends, be it early.

        Args:
            stopped: Asked before each token; True ends the answer there.

        Raises:
            UsageError: The prompt is empty, or the conversation is too long for the model; it is
                as it was before.
            SourceError: The chat template cannot be applied.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": prompt}]
        if self.has_turns:
            ids = encode_messages(self._tokenizer, asked)
        else:
            ids = encode_prompt(self._tokenizer, prompt, raw=True)
        tokens = generate_ids(
            self._model,
            ids,
            stop=self._stop,
            max_new_tokens=self._max_new_tokens,
            sampling=self.sampling,
            say=self._say,
            reader=self._reader,
            generator=self._generator,
        )
        return self._pieces(itertools.takewhile(lambda _: not stopped(), tokens), asked)

    def _pieces(self, tokens: Iterator[int], asked: list[Message]) -> Iterator[str]:
        said: list[str] = []
        try:
            for piece in pieces(tokens, PieceDecoder(self._tokenizer)):
                said.append(piece)
                yield piece
        finally:
            if self.has_turns:
                self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]


def generate(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    greedy: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    system: str | None = None,
    raw: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Yield the text that follows `prompt`, piece by piece; joined, they are the whole answer.

    Args:
        greedy, temperature, top_k, top_p, min_p, repetition_penalty, seed: How tokens are chosen,
            before what the model's settings say; see `Sampling.of`.
        system, raw, max_new_tokens, say: See `Conversation`.

    Raises:
        UsageError: An option is out of range, or the prompt is empty or too long.
        SourceError: The chat template cannot be applied, or the model's settings are malformed.
    """
    sampling = Sampling.of(
        model.settings,
        greedy=greedy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    conversation = Conversation(
        model,
        tokenizer,
        system=system,
        raw=raw,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        say=say,
    )
    return conversation.answer(prompt)
