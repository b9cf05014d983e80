"""The vocabulary of a GGUF file and what its header says about encoding text.

Defaults are llama.cpp's where the file says nothing (`llama-vocab.cpp`), but for the ids of special
tokens: llama.cpp assumes some for a kind of vocabulary, here a token that is not stated is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field

from graphopt.errors import SourceError
from graphopt.sources.gguf.container import GgufFile
from graphopt.sources.gguf.schema import CHECKPOINT, Entries, Text, Texts, read_entries
from graphopt.sources.gguf.splitting import Splitting, splitting_of
from graphopt.support.plain import shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, as the format numbers them."""

Model = Literal["llama", "gpt2"]
"""SentencePiece's merges by score, or byte-level merges by rank; llama.cpp's names for them."""

# Files written by a signed or an unsigned -1 mean no token.
_Id = Annotated[int, Field(ge=-1, le=(1 << 32) - 1)]


class TokenizerKeys(Entries):
    """The entries under `tokenizer.ggml.`, named as in the file."""

    model: Model
    pre: Text | None = None
    tokens: Annotated[Texts, Field(min_length=1)]
    token_type: Annotated[list[int], FailFast()] = Field(default_factory=list)
    scores: Annotated[list[float], FailFast()] = Field(default_factory=list)
    merges: Texts = Field(default_factory=list)
    bos: _Id | None = Field(None, alias="bos_token_id")
    eos: _Id | None = Field(None, alias="eos_token_id")
    eot: _Id | None = Field(None, alias="eot_token_id")
    eom: _Id | None = Field(None, alias="eom_token_id")
    unk: _Id | None = Field(None, alias="unknown_token_id")
    pad: _Id | None = Field(None, alias="padding_token_id")
    mask: _Id | None = Field(None, alias="mask_token_id")
    add_bos: bool | None = Field(None, alias="add_bos_token")
    add_eos: bool | None = Field(None, alias="add_eos_token")
    add_space_prefix: bool | None = None


_HARMLESS = frozenset(
    {"add_sep_token", "seperator_token_id", "cls_token_id", "token_type_count"}
    | {f"fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")}
    | {"prefix_token_id", "suffix_token_id", "middle_token_id"}
)
"""Tokens that no command puts anywhere."""

_SWITCHED_OFF = frozenset({"remove_extra_whitespaces", "lowercase", "strip_accents"})
"""Steps of other kinds of tokenizers, which may be stated as not taken."""

_ENDS_OF_TURN = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
     "<|end_of_text|>", "<EOT>", "<end_of_utterance>"}
)  # fmt: skip
"""Control tokens at which llama.cpp ends a text, for files that do not state them as such."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens, and how text becomes them.

    Attributes:
        model: How pieces are merged.
        tokens: Text by id: byte-level letters for "gpt2", "▁" for a space for "llama".
        kinds: Kind by id.
        scores: Score by id, for "llama".
        merges: Pairs of pieces, the first to be merged first, for "gpt2".
        splitting: How text is cut before it is merged, for "gpt2".
        special: Ids of special tokens by transformers' names: bos, eos, unk, pad, mask.
        ends: Ids of the tokens at which a generated text ends, the file's eos first.
        add_bos: Encoding begins with the bos token.
        add_eos: Encoding ends with the eos token.
        space_prefix: A space is put before text that begins or follows a special token.
        chat_template: A Jinja template; None if there is none.
        swallow: Tokens that take the white space behind them along.
    """

    model: Model
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    splitting: Splitting
    special: dict[str, int]
    ends: list[int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    chat_template: str | None
    swallow: frozenset[int]

    def added(self) -> list[int]:
        """Return the ids of the tokens that are found in text before anything is cut or merged."""
        special = set(self.special.values())
        return [
            number
            for number, kind in enumerate(self.kinds)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) or number in special
        ]


def read_vocabulary(file: GgufFile) -> Vocabulary | None:
    """Return the vocabulary of a file, or None where it has none.

    Raises:
        SourceError: It is of a kind that is not read, or an entry is missing, of another type, out
            of range, or not read though it may change how text is encoded.
    """
    prefix = "tokenizer.ggml."
    entries = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    model = entries.get("model")
    if model in (None, "no_vocab", "none"):
        return None
    if model not in ("llama", "gpt2"):
        raise SourceError(
            f"The tokenizer of {file.path} is of the kind {shown(model)}, which is not read from "
            "GGUF files.",
            f"Known are 'gpt2' and 'llama'; {CHECKPOINT[0].lower()}{CHECKPOINT[1:]}",
        )
    read = TokenizerKeys.names()
    left = {
        key: value
        for key, value in entries.items()
        if key in read
        or not (key in _HARMLESS or (key.split(".")[-1] in _SWITCHED_OFF and value is False))
    }
    return _vocabulary(file, read_entries(file.path, TokenizerKeys, left, prefix))


def _damaged(file: GgufFile, what: str) -> SourceError:
    return SourceError(
        f"The tokenizer of {file.path} is damaged: {what}.",
        "Download the file again, or convert the model again.",
    )


def _vocabulary(file: GgufFile, keys: TokenizerKeys) -> Vocabulary:
    # llama.cpp calls tokens without a text so.
    tokens = tuple(text or f"[EMPTY_{number}]" for number, text in enumerate(keys.tokens))
    numbers: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if numbers.setdefault(token, number) != number:
            raise _damaged(
                file, f"the tokens {numbers[token]} and {number} are both {shown(token)}"
            )
    for name, given in (("token_type", keys.token_type), ("scores", keys.scores)):
        if given and len(given) != len(tokens):
            raise _damaged(file, f"it has {len(tokens)} tokens and {len(given)} values of {name}")
    kinds = keys.token_type or [NORMAL] * len(tokens)
    special: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "pad", "mask", "eot", "eom"):
        number = getattr(keys, name)
        if number is None or number in (-1, (1 << 32) - 1):
            continue
        if number >= len(tokens):
            raise _damaged(file, f"its {name} token is number {number} of {len(tokens)}")
        special[name] = number
    turns = {special.pop(name) for name in ("eot", "eom") if name in special}
    turns |= {
        number
        for number, token in enumerate(tokens)
        if kinds[number] == CONTROL and token in _ENDS_OF_TURN
    }
    ends = [special["eos"]] if "eos" in special else []
    splitting = Splitting(()) if keys.model == "llama" else splitting_of(file, keys.pre)
    merges = _merges(file, keys, kinds)
    return Vocabulary(
        model=keys.model,
        tokens=tokens,
        kinds=tuple(kinds),
        scores=tuple(keys.scores),
        merges=merges,
        splitting=splitting,
        special=special,
        ends=[*ends, *sorted(turns - set(ends))],
        add_bos="bos" in special
        and _first(keys.add_bos, keys.model == "llama" or splitting.add_bos),
        add_eos="eos" in special and _first(keys.add_eos, False),
        space_prefix=keys.model == "llama" and _first(keys.add_space_prefix, True),
        chat_template=_chat_template(file),
        swallow=_swallow(file, tokens, kinds),
    )


def _swallow(file: GgufFile, tokens: tuple[str, ...], kinds: list[int]) -> frozenset[int]:
    """No key states it: llama.cpp tells Phi-3 by the model's name."""
    name = file.metadata.get("general.name")
    if not isinstance(name, str) or not any(s in name.lower() for s in ("phi-3", "phi3")):
        return frozenset()
    return frozenset(
        number
        for number, kind in enumerate(kinds)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        and tokens[number] not in ("<unk>", "<s>", "<|endoftext|>")
    )


def _merges(file: GgufFile, keys: TokenizerKeys, kinds: list[int]) -> tuple[tuple[str, str], ...]:
    """The pairs of a byte-level vocabulary; the other kind's are in its scores."""
    if keys.model == "gpt2":
        if "merges" not in keys.model_fields_set:
            raise _damaged(file, "it has no list of merges")
        return tuple(_pair(file, number, text) for number, text in enumerate(keys.merges))
    if not keys.scores:
        raise _damaged(file, "it has no scores, by which its pieces are merged")
    pieces = [s for s, kind in zip(keys.scores, kinds, strict=True) if kind == NORMAL]
    if len(pieces) > 1 and len(set(pieces)) == 1:
        # Some converters wrote one number for every piece.
        raise _damaged(file, "all its pieces have one score, by which they are merged")
    return ()


def _first(stated: bool | None, default: bool) -> bool:
    return default if stated is None else stated


def _pair(file: GgufFile, number: int, text: str) -> tuple[str, str]:
    # The first piece may begin with a space, and is never empty.
    place = text.find(" ", 1)
    if place < 0 or place + 1 == len(text):
        raise _damaged(file, f"merge {number} is {shown(text)} and should be two pieces")
    return text[:place], text[place + 1 :]


class _Template(Entries):
    chat_template: Text | None = None


def _chat_template(file: GgufFile) -> str | None:
    """The default template; others, for tools and such, are named in other entries."""
    entries: dict[str, Any] = {}
    if "tokenizer.chat_template" in file.metadata:
        entries["chat_template"] = file.metadata["tokenizer.chat_template"]
    return read_entries(file.path, _Template, entries, "tokenizer.").chat_template or None
