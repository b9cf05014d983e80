"""Text as token ids and as windows of them: what every measurement and every pass reads.

Many models were trained with a beginning-of-sequence token before every text, and are far worse
without it. So whatever their tokenizers put before a text stands before every window here. What a
tokenizer puts there is found by asking it, since the flags that say it differ from one tokenizer
class to the next, and some are not heeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from graphopt.errors import SourceError, unknown_name
from graphopt.sources.tokenizer import encode, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["every", "first"]
"""Which windows begin with what a tokenizer puts before a text.

`every`: each of them. `first`: a text is tokenised once and cut, as compression papers do, so that
only its first window does.
"""

_SAMPLES = ("The harbour was quiet.", "a", "7")
"""Texts that a tokenizer is asked with, one after the other until one answers."""


def check_bos(name: str) -> Bos:
    """Return `name` as a way to begin windows.

    Raises:
        UsageError: It is none.
    """
    for known in get_args(Bos):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise unknown_name("way to begin windows", name, get_args(Bos))


def tokenizer_at(folder: Path | None, name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder.

    Args:
        folder: None where there is none.
        name: What the refusal calls the model.

    Raises:
        SourceError: There is none, or the files cannot be read without running code.
    """
    if folder is None:
        raise SourceError(
            f"{name} has no tokenizer.",
            "Put tokenizer.json and tokenizer_config.json into the model's folder.",
        )
    return read_tokenizer(folder)


def special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and behind every text.

    They are what a short text has with special tokens and lacks without them.
    """
    for sample in _SAMPLES:
        plain, whole = encode(tokenizer, sample, special=False), encode(tokenizer, sample)
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
    # A text is cut otherwise beside special tokens, which then still are what stands outside it.
    whole, special = encode(tokenizer, _SAMPLES[0]), set(tokenizer.all_special_ids)
    inner = [place for place, token in enumerate(whole) if token not in special]
    return (whole[: inner[0]], whole[inner[-1] + 1 :]) if inner else ([], [])


@dataclass(frozen=True)
class TokenText:
    """A text as token ids.

    Attributes:
        ids: int64 [T], without what begins windows.
        begin: int64 [n], what every window begins with; n is 0 for tokenizers that put nothing
            before a text, and where windows are cut from one tokenisation.
    """

    ids: Tensor
    begin: Tensor

    @classmethod
    def of(cls, tokenizer: Any, text: str, bos: Bos = "every") -> TokenText:
        """Tokenise a text, as a whole.

        Args:
            tokenizer: A tokenizer of transformers.
            bos: With "first" the ids are those of the tokenizer, with its special tokens.
        """
        ids = encode(tokenizer, text)
        begin: list[int] = []
        if bos == "every":
            begin, end = special_ends(tokenizer)
            ids = _inside(ids, begin, end)
        return cls(torch.tensor(ids, dtype=torch.long), torch.tensor(begin, dtype=torch.long))

    def __len__(self) -> int:
        """Tokens of the longest window that can be cut."""
        return len(self.ids) + len(self.begin)

    def room(self, length: int) -> int:
        """Tokens of text in a window of `length`."""
        return length - len(self.begin)

    def count(self, length: int) -> int:
        """How many windows of `length` tokens there are."""
        return len(self.ids) // self.room(length) if self.room(length) > 0 else 0

    def windows(self, length: int) -> Tensor:
        """Return the windows, int64 [N, length]; what is left over is dropped.

        They do not overlap: each is `begin` and the next `length - n` tokens of the text.
        """
        count, room = self.count(length), max(self.room(length), 0)
        text = self.ids[: count * room].view(count, room)
        return torch.cat([self.begin.expand(count, len(self.begin)), text], 1)


def prompt_ids(
    tokenizer: Any, text: str, ends: tuple[list[int], list[int]] | None = None
) -> list[int]:
    """Return the ids of a text that is to be continued: with what stands before it, not behind.

    Args:
        ends: What `special_ends` gives, if that is at hand.
    """
    begin, end = special_ends(tokenizer) if ends is None else ends
    ids = encode(tokenizer, text)
    return begin + _inside(ids, begin, end)


def _inside(ids: list[int], begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Return ids without `begin` before them and `end` behind them."""
    first = len(begin) if ids[: len(begin)] == list(begin) else 0
    last = len(ids) - len(end) if end and ids[first:][-len(end) :] == list(end) else len(ids)
    return ids[first:last]
