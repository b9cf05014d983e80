"""The tokenizer inside a GGUF file, as files that transformers and ONNX Runtime load.

It is written from the file alone. transformers has this conversion too; what it makes of a file
depends on its release and on which other packages are installed, and it has been wrong.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from graphopt.errors import SourceError, first_line
from graphopt.sources.cache import cache_folder, new_entry
from graphopt.sources.gguf.container import GgufFile
from graphopt.sources.gguf.encoder import SPACE, Encoder, Unencodable, byte_letters
from graphopt.sources.gguf.schema import CHECKPOINT
from graphopt.sources.gguf.vocabulary import CONTROL, UNKNOWN, Vocabulary
from graphopt.sources.tokenizer import read_tokenizer
from graphopt.support.plain import shown

LAYOUT = 4
"""Part of the cache key: raised when the conversion or its check changes."""


def gguf_tokenizer(file: GgufFile, vocabulary: Vocabulary | None) -> Path | None:
    """Return a folder with the file's tokenizer and chat template, converted once into the cache.

    Before it is kept, the tokenizer is loaded as every command loads it and compared with an
    encoder of this package on a text of many scripts and the file's own tokens. The packages that
    read it are part of the cache key, so that the comparison is made again with other releases.

    Returns:
        The folder, or None where the file has no vocabulary.

    Raises:
        SourceError: The tokenizer cannot be converted, or encodes text otherwise than the file's
            vocabulary does.
    """
    if vocabulary is None:
        return None
    releases = f"{version('transformers')}-{version('tokenizers')}"
    folder = cache_folder() / "tokenizers" / f"{file.digest[:32]}-{LAYOUT}-{releases}"
    if folder.is_dir():
        return folder
    with new_entry(folder) as working:
        for name, text in tokenizer_files(vocabulary).items():
            (working / name).write_text(text, encoding="utf-8")
        _check(file, vocabulary, working)
    return folder


def tokenizer_files(vocabulary: Vocabulary) -> dict[str, str]:
    """Return the content of the files of a tokenizer, by name."""
    tokens, special = vocabulary.tokens, vocabulary.special
    build = _scored if vocabulary.model == "llama" else _byte_level
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": tokens[number],
                "single_word": False,
                "lstrip": False,
                "rstrip": number in vocabulary.swallow,
                "normalized": False,
                "special": vocabulary.kinds[number] in (CONTROL, UNKNOWN)
                or number in special.values(),
            }
            for number in vocabulary.added()
        ],
        **build(vocabulary),
        "post_processor": _template(vocabulary),
    }
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is; those of families build parts of it anew.
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        **{f"{name}_token": tokens[number] for name, number in sorted(special.items())},
    }
    files = {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
    }
    if vocabulary.chat_template is not None:
        files["chat_template.jinja"] = vocabulary.chat_template
    return files


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **entries: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **entries,
        "vocab": {token: number for number, token in enumerate(vocabulary.tokens)},
        "merges": merges,
    }


def _byte_level(vocabulary: Vocabulary) -> dict[str, Any]:
    """Merges by rank, of letters that stand for bytes."""
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in vocabulary.splitting.patterns
    ]
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*steps, letters | {"use_regex": False}],
        },
        "decoder": letters | {"use_regex": True},
        "model": _bpe(
            vocabulary,
            list(vocabulary.merges),
            ignore_merges=vocabulary.splitting.whole_words,
        ),
    }


def _scored(vocabulary: Vocabulary) -> dict[str, Any]:
    """Merges by score: of two neighbours that make a token, those of the best token first."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    steps: list[dict[str, Any]] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizer: dict[str, Any] = spaces
    if vocabulary.space_prefix:
        first = {"type": "Prepend", "prepend": SPACE}
        normalizer = {"type": "Sequence", "normalizers": [first, spaces]}
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocabulary.special.get("unk")
    # No space is left to cut at. Without the step onnxruntime-genai cuts as GPT-2 does, and with
    # it puts no space in front.
    cut_nowhere = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    return {
        "normalizer": normalizer,
        "pre_tokenizer": None if vocabulary.space_prefix else cut_nowhere,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": _bpe(
            vocabulary,
            _pairs_by_score(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _pairs_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in the order in which scores merge them.

    A token of 100 letters has 99 ways at the most, and none is longer than a few hundred.
    """
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    added = set(vocabulary.added())
    order = sorted(
        (number for number in numbers.values() if number not in added),
        key=lambda number: -vocabulary.scores[number],
    )
    pairs: list[tuple[str, str]] = []
    for number in order:
        token = vocabulary.tokens[number]
        for place in range(1, len(token)):
            if token[:place] in numbers and token[place:] in numbers:
                pairs.append((token[:place], token[place:]))
    return pairs


def _template(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """What is added around a text, and around each of a pair."""
    ids = {
        "bos": vocabulary.special["bos"] if vocabulary.add_bos else None,
        "eos": vocabulary.special["eos"] if vocabulary.add_eos else None,
    }
    named = {name: vocabulary.tokens[n] for name, n in ids.items() if n is not None}
    if not named:
        return None

    def around(sequence: str, kind: int) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": kind}}]
        if "bos" in named:
            steps.insert(0, {"SpecialToken": {"id": named["bos"], "type_id": kind}})
        if "eos" in named:
            steps.append({"SpecialToken": {"id": named["eos"], "type_id": kind}})
        return steps

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [ids[name]], "tokens": [token]}
            for name, token in named.items()
        },
    }


PROBE = (
    "The quick brown fox's 12 jumps, they'll said: \"3.14159 x 1000000\" (2024-11-28)!\n"
    "  def f(x):\n\treturn x**2  # two   three    four\n\n\n"
    "Größe naïve Ærøskøbing façade; Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم "
    "नमस्ते दुनिया ไทยภาษา 你好，世界。日本語のテキスト、カタカナ 한국어 문장입니다 "
    "x²+y³=½ ≠ ∑∞ → €5 £3 ﬁ ℵ ǅ e\u0301 a\u0308\r\n"
    "🙂👩‍👩‍👧 🇩🇪 ✈️ \u200b\u00a0\u3000\u2028 ١٢٣ १२३ Ⅷ ４５ \x00\x07\x7f "
    "CamelCaseHTTPServer snake_case_name don't I'D WE'RE ... --- ___ \\n <a href='#'>&amp;</a> \n"
)
"""Text of many scripts, with numbers, runs of spaces, control characters and what rules of
splitting differ in."""

_SAMPLED = 1500
"""How many of the file's own tokens are encoded in the check, evenly over the vocabulary."""


def own_text(vocabulary: Vocabulary) -> list[str]:
    """Texts made of the vocabulary: what its tokens say, and its special tokens among words."""
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    step = max(1, len(vocabulary.tokens) // _SAMPLED)
    words = []
    added = vocabulary.added()
    plain = [n for n in range(0, len(vocabulary.tokens), step) if n not in set(added)]
    for number in plain:
        token = vocabulary.tokens[number]
        if vocabulary.model == "llama":
            words.append(token.replace(SPACE, " "))
        elif all(letter in bytes_of for letter in token):
            words.append(bytes(bytes_of[c] for c in token).decode("utf-8", errors="ignore"))
    shown_added = [vocabulary.tokens[n] for n in added[:: max(1, len(added) // 100)]]
    ends = [vocabulary.tokens[n] for n in (*vocabulary.special.values(), *vocabulary.ends)]
    runs = ["".join(words[n : n + 50]) for n in range(0, len(words), 50)]
    among = " a ".join([*ends, *shown_added]) + "\n" + "".join([*ends, *shown_added])
    return [*runs, "\n".join(words), among, *ends]


def _check(file: GgufFile, vocabulary: Vocabulary, folder: Path) -> None:
    """Compare a converted tokenizer, loaded as it will be, with the file's vocabulary."""
    try:
        tokenizer = read_tokenizer(folder)
    except SourceError as error:
        raise SourceError(
            f"The tokenizer of {file.path}, of kind {vocabulary.model!r}, cannot be converted: "
            f"{first_line(error)}.",
            CHECKPOINT,
        ) from error
    held = tokenizer.get_vocab()
    remedy = "Report it with the versions of transformers and tokenizers; " + (
        f"{CHECKPOINT[0].lower()}{CHECKPOINT[1:]}"
    )
    for number, token in enumerate(vocabulary.tokens):
        if held.get(token) != number:
            raise SourceError(
                f"The tokenizer of {file.path} is not converted rightly: its token {number}, "
                f"{shown(token)}, becomes number {held.get(token)}.",
                remedy,
            )
    encoder = Encoder(vocabulary)
    for text in ("", "a", " a", PROBE, *PROBE.splitlines(), *own_text(vocabulary)):
        try:
            wanted = encoder.encode(text)
        except Unencodable as error:
            raise SourceError(
                f"The tokenizer of {file.path} has no token {str(error)!r}, which it needs for "
                f"{shown(text)}.",
                CHECKPOINT,
            ) from error
        got = tokenizer(text, verbose=False)["input_ids"]
        if got != wanted:
            place = next(
                (n for n, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]),
                min(len(got), len(wanted)),
            )
            raise SourceError(
                f"The tokenizer of {file.path} is not converted rightly: piece {place} of "
                f"{shown(text)} is {_piece(vocabulary, got, place)} and should be "
                f"{_piece(vocabulary, wanted, place)}.",
                remedy,
            )


def _piece(vocabulary: Vocabulary, ids: list[int], place: int) -> str:
    if place >= len(ids):
        return "missing"
    known = ids[place] < len(vocabulary.tokens)
    return shown(vocabulary.tokens[ids[place]]) if known else f"number {ids[place]}"
