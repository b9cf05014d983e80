"""Generating text token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.errors import SourceError, UsageError, reason
from graphopt.evaluate import LanguageModel
from graphopt.ir.execute import complete_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool = False
) -> list[int]:
    """Return the tokens of a prompt, put into the chat template where the tokenizer has one.

    Args:
        raw: Continue the text as it is, without the template.

    Raises:
        UsageError: The prompt has no tokens.
        SourceError: The template cannot be applied.
    """
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:
            # A template is a program of the model's author and fails in its own ways.
            raise SourceError(
                f"The chat template cannot be applied: {reason(error)}.",
                "Pass --raw to continue the prompt without it.",
            ) from error
        # The template writes the special tokens itself.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise UsageError("The prompt is empty.", "Give at least one word.")
    return list(ids)


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
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def pick_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Choose a token.

    Args:
        logits: [vocab].
        temperature: 0 takes the likeliest; otherwise the logits are divided by it.
        top_p: Draw from the fewest tokens whose probabilities reach this sum.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits.double() / temperature, -1).sort(descending=True)
    # A token belongs to the nucleus if those before it do not fill it.
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    probabilities = probabilities.masked_fill(outside, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def end_tokens(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens at which generation stops: the tokenizer's and the config's."""
    stated = model.config.get("eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    return {int(token) for token in (tokenizer.eos_token_id, *listed) if token is not None}


def check_options(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse options of generation that make no sense, before a model is opened.

    Raises:
        UsageError: One is out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise UsageError(
            "Generation needs a temperature of at least 0, a top-p above 0 and at most 1, and at "
            "least one new token."
        )


def generate_ids(
    model: LanguageModel,
    prompt: list[int],
    *,
    stop: set[int],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt`, without the one that ends the text.

    Args:
        prompt: Token ids.
        stop: Tokens that end the text.
        max_new_tokens: How many at most; fewer where the model's positions end.
        temperature: 0 for greedy decoding.
        top_p: See `pick_token`.
        seed: Of the sampling.

    Raises:
        UsageError: An option is out of range, or the prompt leaves no position free.
    """
    check_options(max_new_tokens, temperature, top_p)
    if model.positions is not None:
        if len(prompt) >= model.positions:
            raise UsageError(
                f"The prompt has {len(prompt)} tokens, and {model.name} was made for "
                f"{model.positions}.",
                "Shorten it.",
            )
        max_new_tokens = min(max_new_tokens, model.positions - len(prompt))
    return _generate(model, prompt, stop, max_new_tokens, temperature, top_p, seed)


def _generate(
    model: LanguageModel,
    prompt: list[int],
    stop: set[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    cache = model.start_text(len(prompt) + max_new_tokens)
    new, past = torch.tensor([prompt]), 0
    for _ in range(max_new_tokens):
        logits, cache = model.step(complete_inputs({"input_ids": new}, past), cache)
        past += new.shape[1]
        token = pick_token(logits[0, -1], temperature, top_p, generator)
        if token in stop:
            return
        yield token
        new = torch.tensor([[token]])


def generate(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: bool = False,
) -> Iterator[str]:
    """Yield the text that follows `prompt`, piece by piece; joined, they are the whole answer.

    Args:
        raw: See `encode_prompt`; for the others see `generate_ids`.

    Raises:
        UsageError: An option is out of range, or the prompt is empty or too long.
        SourceError: The chat template cannot be applied.
    """
    tokens = generate_ids(
        model,
        encode_prompt(tokenizer, prompt, raw=raw),
        stop=end_tokens(model, tokenizer),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    return _pieces(tokens, PieceDecoder(tokenizer))


def _pieces(tokens: Iterator[int], decoder: PieceDecoder) -> Iterator[str]:
    for token in tokens:
        piece = decoder.add(token)
        if piece:
            yield piece
    rest = decoder.finish()
    if rest:
        yield rest
