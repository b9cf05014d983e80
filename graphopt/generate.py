"""Generating text token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.errors import SourceError, UsageError, first_line
from graphopt.execute.interpreter import complete_inputs
from graphopt.execute.language_model import LanguageModel
from graphopt.runtime.chat import chat_text
from graphopt.sources.generation import GenerationSettings
from graphopt.sources.tokenizer import decode, encode
from graphopt.sources.windows import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"


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
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("The prompt is not valid Unicode.", "Give it in UTF-8.") from error
    if not prompt:
        raise UsageError("The prompt is empty.", "Give at least one word.")
    if tokenizer.chat_template and not raw:
        try:
            template = tokenizer.get_chat_template()
            text = chat_text(template, prompt, tokenizer.special_tokens_map)
        except ValueError as error:
            raise SourceError(
                f"The chat template cannot be applied: {first_line(error)}.",
                "Pass --raw to continue the prompt without it.",
            ) from error
        ids = encode(tokenizer, text, special=False)
    else:
        ids = prompt_ids(tokenizer, prompt)
    if not ids:
        raise UsageError("The prompt is empty.", "Give at least one word.")
    return ids


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


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise the logits are divided by it.
        top_k: Draw from so many of the likeliest tokens; 0 for all.
        top_p: Draw from the fewest tokens whose probabilities reach this sum.
        min_p: Draw from tokens at least this share as likely as the likeliest.
        repetition_penalty: Logits of tokens that are in the text so far are divided by it where
            they are positive, and multiplied by it where they are not.
        seed: The seed of the generator that draws tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @classmethod
    def of(
        cls,
        settings: GenerationSettings,
        *,
        greedy: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Sampling:
        """Return what a user asks for, and where that says nothing what the model's settings do.

        Tokens are drawn where the settings say so, or where a temperature, `top_k` or `top_p` is
        given. What neither states has the values that transformers gives it.

        Raises:
            UsageError: `greedy` is asked for along with an option of drawing.
        """
        given = [value for value in (temperature, top_k, top_p) if value is not None]
        if greedy and any(given):
            raise UsageError(
                "Greedy decoding draws nothing, and temperature, top-k or top-p are given too.",
                "Leave out one or the other.",
            )
        penalty = settings.repetition_penalty
        drawn = settings.do_sample or bool(given)
        heat = settings.temperature if temperature is None else temperature
        if greedy or not drawn or heat == 0:
            return cls(repetition_penalty=penalty, seed=seed)
        return cls(
            heat,
            settings.top_k if top_k is None else top_k,
            # 0 is the likeliest token alone, which every share of it gives too.
            max(settings.top_p, 1e-9) if top_p is None else top_p,
            settings.min_p,
            penalty,
            seed,
        )

    def __str__(self) -> str:
        parts = []
        if self.temperature:
            parts += [f"temperature {self.temperature:g}", f"top-k {self.top_k or 'all'}"]
            parts += [f"top-p {self.top_p:g}"]
            parts += [f"min-p {self.min_p:g}"] if self.min_p else []
        if self.repetition_penalty != 1:
            parts.append(f"repetition penalty {self.repetition_penalty:g}")
        if not self.temperature:
            return f"greedy decoding{', ' * bool(parts)}{', '.join(parts)}"
        return f"sampling: {', '.join(parts)}, seed {self.seed}"


def token_odds(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return what tokens are drawn by.

    Filters apply in transformers' order: each sees what the ones before it left.

    Args:
        logits: [vocab].
        sampling: With a temperature above 0.

    Returns:
        Probabilities [vocab] in fp64.
    """
    scores, order = (logits.double() / sampling.temperature).sort(descending=True)
    if sampling.top_k:
        scores[sampling.top_k :] = -torch.inf
    probabilities = torch.softmax(scores, -1)
    # A token belongs to the nucleus if those before it do not fill it.
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
    outside |= probabilities < sampling.min_p * probabilities[0]
    outside[0] = False
    probabilities = probabilities.masked_fill(outside, 0.0)
    return torch.zeros_like(probabilities).scatter(0, order, probabilities / probabilities.sum())


def pick_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose a token by its logits [vocab]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(token_odds(logits, sampling), 1, generator=generator))


def penalise(logits: Tensor, penalty: float, text: Tensor) -> Tensor:
    """Return logits [vocab] with those of the tokens of a text (int64 [T]) made less likely.

    Source: Keskar et al., CTRL, arXiv 1909.05858, section 4.1, as transformers has it.
    """
    own = logits[text]
    return logits.scatter(0, text, torch.where(own > 0, own / penalty, own * penalty))


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
    warm = 0 <= sampling.temperature < math.inf  # which a temperature of NaN is not
    in_range = warm and sampling.top_k >= 0 and 0 < sampling.top_p <= 1
    if not in_range or max_new_tokens < 1:
        raise UsageError(
            "Generation needs a temperature and a top-k of at least 0, a top-p above 0 and at most "
            "1, and at least one new token."
        )


def generate_ids(
    model: LanguageModel,
    prompt: list[int],
    *,
    stop: set[int],
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt`, without the one that ends the text.

    Args:
        prompt: Token ids.
        stop: Tokens that end the text.
        max_new_tokens: How many at most; fewer where the model's positions end.
        sampling: How each is chosen; the likeliest by default.
        say: Told in a sentence, first of all, where the model's positions end sooner.

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
    return _generate(model, prompt, stop, max_new_tokens, sampling)


def _generate(
    model: LanguageModel,
    prompt: list[int],
    stop: set[int],
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = model.start_text(len(prompt) + max_new_tokens)
    text = new = torch.tensor([prompt])
    switch = model.rotary_switch
    for _ in range(max_new_tokens):
        past = text.shape[1] - new.shape[1]
        if switch is not None and 0 < past <= switch < text.shape[1]:
            # Keys in the cache have the frequencies of short texts: read the whole text again.
            cache, new, past = model.start_text(len(prompt) + max_new_tokens), text, 0
        logits, cache = model.step(complete_inputs({"input_ids": new}, past), cache)
        scores = logits[0, -1]
        if sampling.repetition_penalty != 1:
            scores = penalise(scores, sampling.repetition_penalty, text[0])
        token = pick_token(scores, sampling, generator)
        if token in stop:
            return
        yield token
        new = torch.tensor([[token]])
        text = torch.cat([text, new], 1)


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
    seed: int = 0,
    raw: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Yield the text that follows `prompt`, piece by piece; joined, they are the whole answer.

    Args:
        greedy, temperature, top_k, top_p, seed: How tokens are chosen, before what the model's
            settings say; see `Sampling.of`.
        raw: See `encode_prompt`; for the others see `generate_ids`.

    Raises:
        UsageError: An option is out of range, or the prompt is empty or too long.
        SourceError: The chat template cannot be applied, or the model's settings are malformed.
    """
    sampling = Sampling.of(
        model.settings, greedy=greedy, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    tokens = generate_ids(
        model,
        encode_prompt(tokenizer, prompt, raw=raw),
        stop=end_tokens(model, tokenizer),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        say=say,
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
