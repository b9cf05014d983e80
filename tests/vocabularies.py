"""Vocabularies of GGUF files, whose pieces cross every boundary that a tokenizer could cut at."""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

from graphopt.sources.gguf.container import GgufFile
from graphopt.sources.gguf.encoder import byte_letters
from graphopt.sources.gguf.tokenizer import PROBE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def file_of(entries: dict[str, Any], **changes: Any) -> GgufFile:
    """A header with a vocabulary; entries at None are left out."""
    entries = entries | changes
    metadata = {f"tokenizer.ggml.{k}": v for k, v in entries.items() if v is not None}
    return GgufFile(Path("m.gguf"), metadata, {}, f"{random.getrandbits(128):032x}")


def grown(symbols: list[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding learnt on text that is not cut, so that pieces cross every boundary."""
    merges = []
    for _ in range(count):
        pairs = Counter(itertools.pairwise(symbols))
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((left, right))
        whole: list[str] = []
        for symbol in symbols:
            if whole and (whole[-1], symbol) == (left, right):
                whole[-1] = left + right
            else:
                whole.append(symbol)
        symbols = whole
    return merges


SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>", "[user]", "\n\n", "   "]
KINDS = [UNKNOWN, CONTROL, CONTROL, CONTROL, USER_DEFINED, USER_DEFINED, USER_DEFINED]
IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


@functools.cache
def scored(across_words: bool = True) -> dict[str, Any]:
    """A SentencePiece vocabulary: special tokens, bytes, letters, and pieces by score.

    Args:
        across_words: Pieces may hold a space elsewhere than at their start.
    """
    text = PROBE.replace(" ", "▁")
    letters = sorted(set(text) - set("🙂日\x00"))
    # The pieces of a pair that was merged twice are one token.
    pieces = list(dict.fromkeys(a + b for a, b in grown(list(text), 150)))
    pieces = [
        piece
        for piece in pieces
        if set(piece) <= set(letters) and piece not in {*letters, *SPECIAL}
    ]
    if not across_words:
        pieces = [piece for piece in pieces if "▁" not in piece.lstrip("▁")]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pieces]
    kinds = [*KINDS, *[BYTE] * 256, *[NORMAL] * (len(letters) + len(pieces))]
    scores = [
        *[0.0] * (len(SPECIAL) + 256),
        *[-1e4] * len(letters),
        *range(-1, -len(pieces) - 1, -1),
    ]
    return {
        "model": "llama", "pre": "default", "tokens": tokens, "token_type": kinds,
        "scores": [float(score) for score in scores], **IDS,
    }  # fmt: skip


@functools.cache
def ranked() -> dict[str, Any]:
    """A byte-level vocabulary."""
    letters = byte_letters()
    merges = grown([letters[byte] for byte in PROBE.encode()], 200)
    pieces = list(dict.fromkeys(a + b for a, b in merges))
    tokens = [*SPECIAL, *letters, *pieces]
    return {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens,
        "token_type": [*KINDS, *[NORMAL] * (len(letters) + len(pieces))],
        "merges": [f"{left} {right}" for left, right in merges], **IDS,
    }  # fmt: skip
