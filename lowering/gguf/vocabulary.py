"""A tokenizer as the vocabulary of a GGUF file, compared with how llama.cpp encodes text.

What transformers makes of tokenizer.json is what is wanted. llama.cpp has two ways to it that are
written here: byte-level merges by rank, of text that a rule with a name has cut, and
SentencePiece's merges by score. Which rule, and whether a space goes in front, no file says; so
they are tried, by an encoder that follows llama.cpp, on texts of many scripts and of the
vocabulary's own tokens, until the ids are the tokenizer's.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphopt.lowering.gguf.keys import Unwritable, Value
from graphopt.lowering.tokenizer import chat_template
from graphopt.sources.gguf.encoder import Encoder, Unencodable
from graphopt.sources.gguf.splitting import SPLITTINGS, Splitting
from graphopt.sources.gguf.tokenizer import PROBE, own_text
from graphopt.sources.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
)
from graphopt.sources.tokenizer import encode, read_tokenizer
from graphopt.sources.windows import special_ends

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

_USUAL = {
    "gemma2": "default", "gpt2": "gpt-2", "llama": "llama-bpe", "mistral": "tekken",
    "qwen2": "qwen2", "qwen3": "qwen2", "phi3": "gpt-4o",
}  # fmt: skip
"""The rule that models of a type have mostly."""


@dataclass(frozen=True)
class Written:
    """A vocabulary and the name of its rule.

    Attributes:
        vocabulary: What a reader of the file gets.
        rule: The value of `tokenizer.ggml.pre`.
    """

    vocabulary: Vocabulary
    rule: str

    def keys(self) -> dict[str, Value]:
        """Return the entries of the file."""
        vocabulary = self.vocabulary
        keys: dict[str, Value] = {
            "tokenizer.ggml.model": vocabulary.model,
            "tokenizer.ggml.pre": self.rule,
            "tokenizer.ggml.tokens": list(vocabulary.tokens),
            "tokenizer.ggml.token_type": list(vocabulary.kinds),
            "tokenizer.ggml.add_bos_token": vocabulary.add_bos,
            "tokenizer.ggml.add_eos_token": vocabulary.add_eos,
        }
        if vocabulary.model == "gpt2":
            keys["tokenizer.ggml.merges"] = [f"{a} {b}" for a, b in vocabulary.merges]
        else:
            keys["tokenizer.ggml.scores"] = list(vocabulary.scores)
            keys["tokenizer.ggml.add_space_prefix"] = vocabulary.space_prefix
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}
        for name, number in vocabulary.special.items():
            keys[f"tokenizer.ggml.{names[name]}_token_id"] = number
        others = [number for number in vocabulary.ends if number != vocabulary.special.get("eos")]
        for name, number in zip(("eot", "eom"), others, strict=False):
            keys[f"tokenizer.ggml.{name}_token_id"] = number
        if vocabulary.chat_template is not None:
            keys["tokenizer.chat_template"] = vocabulary.chat_template
        return keys


def written_vocabulary(folder: Path, model_type: str, rows: int, ends: tuple[int, ...]) -> Written:
    """Return the vocabulary of a tokenizer.

    Args:
        folder: With the tokenizer's files.
        model_type: transformers' type of the model.
        rows: Of the embedding; numbers without a token get one that no text has.
        ends: Tokens at which a generated text ends.

    Raises:
        Unwritable: llama.cpp has no form of it.
        SourceError: The tokenizer cannot be loaded.
    """
    tokenizer = read_tokenizer(folder)
    states = tuple(sorted((p.name, p.stat().st_mtime_ns) for p in folder.glob("*.json")))
    return _written(tokenizer, folder, states, model_type, rows, ends)


@functools.lru_cache(maxsize=4)  # a form is checked before the passes run, and written behind them
def _written(
    tokenizer: Any,
    folder: Path,
    states: tuple[tuple[str, int], ...],
    model_type: str,
    rows: int,
    ends: tuple[int, ...],
) -> Written:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Unwritable("its tokenizer is no tokenizer.json, from which a vocabulary is made")
    content = json.loads(backend.to_str())
    if content["model"].get("type") != "BPE":
        kind = content["model"].get("type")
        raise Unwritable(f"its tokenizer is of the kind {kind!r}, and BPE is what is written")
    base = _vocabulary(tokenizer, content, rows, ends)
    texts = list(_texts(base, content))
    wanted = [encode(tokenizer, text) for text in texts]
    worst: tuple[int, str] = (-1, "")
    for rule, candidate in _candidates(base, _patterns(content), model_type):
        place = _first_difference(candidate, texts, wanted)
        if place is None:
            return Written(candidate, rule)
        worst = max(worst, (place, texts[place]))
    raise Unwritable(
        f"llama.cpp has no rule by which a vocabulary encodes text as its tokenizer does: the one "
        f"that comes nearest differs in {worst[1][:60]!r}"
    )


def _texts(vocabulary: Vocabulary, content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is encoded to compare; normalised where the tokenizer normalises all text.

    llama.cpp normalises nothing, so of other text the ids differ.
    """
    normal = "NFC" in json.dumps(content.get("normalizer"))
    for text in ("a", " a", *PROBE.splitlines(), PROBE, *own_text(vocabulary)):
        yield unicodedata.normalize("NFC", text) if normal else text


def _first_difference(
    vocabulary: Vocabulary, texts: list[str], wanted: list[list[int]]
) -> int | None:
    encoder = Encoder(vocabulary)
    for place, (text, ids) in enumerate(zip(texts, wanted, strict=True)):
        try:
            if encoder.encode(text) != ids:
                return place
        except Unencodable:
            return place
    return None


def _patterns(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the regular expressions by which a tokenizer.json cuts text."""
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    return tuple(
        step["pattern"]["Regex"]
        for step in steps
        if step.get("type") == "Split" and "Regex" in step.get("pattern", {})
    )


def _candidates(
    vocabulary: Vocabulary, patterns: tuple[str, ...], model_type: str
) -> Iterator[tuple[str, Vocabulary]]:
    """Yield the names of rules, and the vocabulary with each: the likely ones first.

    A small vocabulary may not tell two rules apart.
    """
    if vocabulary.model == "llama":
        for prefix in (True, False):
            yield "default", replace(vocabulary, space_prefix=prefix)
        return
    tried: list[Splitting] = []
    same = [name for name, splitting in SPLITTINGS.items() if splitting.patterns == patterns]
    for name in (*same, _USUAL.get(model_type, "gpt-2"), *SPLITTINGS):
        splitting = SPLITTINGS[name]
        if splitting not in tried:
            tried.append(splitting)
            yield name, replace(vocabulary, splitting=splitting)


def _vocabulary(
    tokenizer: Any, content: Mapping[str, Any], rows: int, ends: tuple[int, ...]
) -> Vocabulary:
    """Return the vocabulary without what must be tried: the rule, and the space in front."""
    model = content["model"]
    is_scored = bool(model.get("byte_fallback"))
    added = {item["id"]: item for item in content["added_tokens"]}
    numbers = {number: token for token, number in model["vocab"].items()}
    numbers |= {number: item["content"] for number, item in added.items()}
    if max(numbers) >= rows:
        raise Unwritable(
            f"its tokenizer has a token of the number {max(numbers)}, and the model embeds {rows}"
        )
    special = {
        name: number
        for name in ("bos", "eos", "unk", "pad", "mask")
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None and number < rows
    }
    tokens, kinds = [], []
    for number in range(rows):
        token = numbers.get(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        kinds.append(_kind(number, token, added, special, is_scored))
    begin, end = special_ends(tokenizer)
    if begin not in ([], [special.get("bos")]) or end not in ([], [special.get("eos")]):
        raise Unwritable("its tokenizer puts other tokens around a text than bos and eos")
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    return Vocabulary(
        model="llama" if is_scored else "gpt2",
        tokens=tuple(tokens),
        kinds=tuple(kinds),
        scores=_scores(tokens, merges) if is_scored else (),
        merges=() if is_scored else tuple((a, b) for a, b in merges),
        splitting=Splitting(()),
        special=special,
        # Configs of other sizes than the model's state tokens that it cannot write.
        ends=[number for number in ends if 0 <= number < rows],
        add_bos=bool(begin),
        add_eos=bool(end),
        space_prefix=False,
        chat_template=chat_template(tokenizer),
        swallow=frozenset(number for number, item in added.items() if item.get("rstrip")),
    )


def _kind(
    number: int,
    token: str | None,
    added: Mapping[int, Mapping[str, Any]],
    special: Mapping[str, int],
    is_scored: bool,
) -> int:
    if token is None:
        return UNUSED
    if number == special.get("unk") and is_scored:
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    return BYTE if is_scored and _BYTE.fullmatch(token) else NORMAL


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> tuple[float, ...]:
    """Return scores by which pieces are merged in the order of the merges.

    A piece is as good as the first merge that makes it; letters are made by none.
    """
    order: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        order.setdefault(left + right, rank)
    places = {token: place for place, token in enumerate(sorted(order, key=order.__getitem__))}
    worst = len(places)
    return tuple(float(-places.get(token, worst + i)) for i, token in enumerate(tokens))
