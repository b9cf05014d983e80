"""How the tokenizers of GGUF files cut text before its pieces are merged, by their rule's name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphopt.errors import SourceError
from graphopt.sources.gguf.container import GgufFile
from graphopt.support.plain import shown


@dataclass(frozen=True)
class Splitting:
    """How text is cut before its pieces are merged.

    Attributes:
        patterns: Regular expressions of a piece; each cuts what the one before left whole.
        whole_words: A piece that is itself a token is not merged up from letters.
        add_bos: Encoding begins with the first token where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL = _MARKS + _SPACE


def _words(digits: str) -> tuple[str, ...]:
    """Contractions, words, numbers, marks and space, as most models after GPT-2 cut them."""
    return (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{digits}{_TAIL}",)


_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(ending: str, digits: str) -> tuple[str, ...]:
    """Words end where small letters are followed by a capital one."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{_CAPITALS}*{_SMALL}+{ending}|{lead}{_CAPITALS}+{_SMALL}*{ending}"
    return (rf"{words}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACE}",)


_GPT2 = Splitting((r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",))
# Two patterns rather than the Digits step of the original, which onnxruntime-genai skips.
_DIGITS = Splitting((r"\p{N}", *_GPT2.patterns))
# What llama.cpp falls back on; no model was trained with it.
_DEFAULT = Splitting(
    (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2.patterns, r"\p{N}+", r"[0-9][0-9][0-9]"),
)
_FALCON = Splitting((r"[\p{P}\$\+<=>\^~\|`]+", *_GPT2.patterns, r"[0-9][0-9][0-9]"))
_DBRX = Splitting(_words("{1,3}"))
_LLAMA3 = replace(_DBRX, whole_words=True, add_bos=True)
_QWEN2 = Splitting(_words(""))
_QWEN35 = Splitting((
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACE}",
))  # fmt: skip
_TEKKEN = Splitting(_cased_words("", ""), whole_words=True, add_bos=True)
_GPT4O = Splitting(_cased_words(f"{_CONTRACTIONS}?", "{1,3}"))
_DEEPSEEK3 = Splitting((
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{_SPACE}",
))  # fmt: skip
_DEEPSEEK_CODER = Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"))

SPLITTINGS: dict[str, Splitting] = {
    "default": _DEFAULT,
    **dict.fromkeys(
        ("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling", "gigachat",
         "mellum", "a.x-4.0", "exaone4"),
        _GPT2,
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _DIGITS,
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama-v3", "llama3", "falcon3", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _DBRX),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan"), _QWEN2
    ),
    "qwen35": _QWEN35,
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "deepseek-coder": _DEEPSEEK_CODER,
    "falcon": _FALCON,
}  # fmt: skip
"""Splitters by `tokenizer.ggml.pre`, as llama.cpp has them (`llama-vocab.cpp`)."""


def splitting_of(file: GgufFile, rule: str | None) -> Splitting:
    """Return how the byte-level tokenizer of a file cuts text.

    Raises:
        SourceError: The rule is not known.
    """
    rule = "default" if rule is None else rule
    if rule not in SPLITTINGS:
        raise SourceError(
            f"The tokenizer of {file.path} splits text by the rule {shown(rule)}, which is not "
            "supported.",
            f"Known are {', '.join(sorted(SPLITTINGS))}; give the safetensors checkpoint of the "
            "model instead.",
        )
    return SPLITTINGS[rule]
