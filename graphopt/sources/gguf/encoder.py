"""A small encoder that follows llama.cpp, to check converted tokenizers against.

It shares nothing with the `tokenizers` package, neither code nor the form of the rules, so that a
conversion that went wrong, or a release that reads its result otherwise, shows as a difference.
Source: `llama-vocab.cpp` of llama.cpp.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

import regex

from graphopt.sources.gguf.vocabulary import Vocabulary

SPACE = "▁"
"""What SentencePiece writes for a space."""


class Unencodable(Exception):
    """The vocabulary lacks a token that some text needs."""


class Encoder:
    """Text to ids as llama.cpp does it; special tokens in the text are recognised."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
        tokens = vocabulary.tokens
        self._added = sorted(vocabulary.added(), key=lambda number: -len(tokens[number]))
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(vocabulary.merges)))}
        self._patterns = [regex.compile(pattern) for pattern in vocabulary.splitting.patterns]
        self._letters = byte_letters()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with the first and last token where the file adds them.

        Raises:
            Unencodable: The vocabulary lacks a token that the text needs.
        """
        found: list[int] = []
        is_first = True
        for part in self._parts(text):
            if isinstance(part, int):
                found.append(part)
                is_first = True
            else:
                found += self._scored(part, is_first) if self._is_scored else self._ranked(part)
                is_first = False
        special = self.vocabulary.special
        return [
            *([special["bos"]] if self.vocabulary.add_bos else []),
            *found,
            *([special["eos"]] if self.vocabulary.add_eos else []),
        ]

    @property
    def _is_scored(self) -> bool:
        return self.vocabulary.model == "llama"

    def _parts(self, text: str) -> list[str | int]:
        """Cut the added tokens out, the longest first wherever they stand."""
        parts: list[str | int] = [text] if text else []
        for number in self._added:
            token = self.vocabulary.tokens[number]
            if token in text:
                strip = number in self.vocabulary.swallow
                parts = [piece for part in parts for piece in _cut(part, token, number, strip)]
        return parts

    def _scored(self, text: str, is_first: bool) -> Iterator[int]:
        if is_first and self.vocabulary.space_prefix:
            text = " " + text
        numbers, scores = self._numbers, self.vocabulary.scores

        def order(left: str, right: str) -> float | None:
            number = numbers.get(left + right)
            return None if number is None else -scores[number]

        for piece in merged(list(text.replace(" ", SPACE)), order):
            if piece in numbers:
                yield numbers[piece]
                continue
            for byte in piece.encode():
                token = f"<0x{byte:02X}>"
                if token not in numbers:
                    raise Unencodable(token)
                yield numbers[token]

    def _ranked(self, text: str) -> Iterator[int]:
        def order(left: str, right: str) -> float | None:
            return self._ranks.get((left, right))

        words = [text]
        for pattern in self._patterns:
            words = [piece for word in words for piece in _split(pattern, word)]
        for word in words:
            letters = "".join(self._letters[byte] for byte in word.encode())
            if self.vocabulary.splitting.whole_words and letters in self._numbers:
                yield self._numbers[letters]
                continue
            for piece in merged(list(letters), order):
                for part in [piece] if piece in self._numbers else piece:
                    if part not in self._numbers:
                        raise Unencodable(part)
                    yield self._numbers[part]


def _cut(part: str | int, token: str, number: int, strip: bool) -> Iterator[str | int]:
    if isinstance(part, int):
        yield part
        return
    first, *others = part.split(token)
    if first:
        yield first
    for other in others:
        yield number
        other = other.lstrip(" \t\n\v\f\r") if strip else other
        if other:
            yield other


def _split(pattern: regex.Pattern[str], word: str) -> Iterator[str]:
    """The matches of a pattern, and what lies between them."""
    position = 0
    for match in pattern.finditer(word):
        if match.start() > position:
            yield word[position : match.start()]
        if match.group():
            yield match.group()
        position = match.end()
    if position < len(word):
        yield word[position:]


def merged(symbols: list[str], order: Callable[[str, str], float | None]) -> list[str]:
    """Merge neighbours while a pair has an order, the lowest first, of equals the leftmost."""
    following = [*range(1, len(symbols)), -1] if symbols else []
    before = list(range(-1, len(symbols) - 1))
    queue: list[tuple[float, int, int, str, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            place = order(symbols[left], symbols[right])
            if place is not None:
                heapq.heappush(queue, (place, left, right, symbols[left], symbols[right]))

    for left in range(len(symbols) - 1):
        offer(left, left + 1)
    while queue:
        _, left, right, first, second = heapq.heappop(queue)
        if (symbols[left], symbols[right]) != (first, second) or following[left] != right:
            continue  # one of them has been merged since
        symbols[left], symbols[right] = first + second, ""
        following[left] = following[right]
        if following[right] >= 0:
            before[following[right]] = left
        offer(before[left], left)
        offer(left, following[left])
    return [symbol for symbol in symbols if symbol]


def byte_letters() -> list[str]:
    """Return GPT-2's printable letter for every byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
