"""The tokenizer inside a GGUF file, as files that transformers and ONNX Runtime load."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import SourceError, reason
from graphopt.sources.cache import cache_folder, new_entry
from graphopt.sources.gguf_file import GgufFile

LAYOUT = 2
"""Part of the cache key: raised when the conversion below changes."""

# How the token types are numbered in the format.
CONTROL, USER_DEFINED = 3, 4


@dataclass(frozen=True)
class Splitting:
    """How text is cut before its pieces are merged.

    Attributes:
        patterns: Regular expressions of a piece; each cuts what the one before left whole.
        whole_words: A piece that is itself a token is not merged up from letters.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = Splitting((_CONTRACTIONS + _WORD + r"|\p{N}{1,3}" + _TAIL,), whole_words=True)
_QWEN2 = Splitting((_CONTRACTIONS + _WORD + r"|\p{N}" + _TAIL,))
_GPT2 = Splitting((r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",))
# Two patterns rather than the Digits step of the original, which onnxruntime-genai skips.
_DIGITS = Splitting((r"\p{N}", *_GPT2.patterns))

SPLITTINGS: dict[str, Splitting] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""By `tokenizer.ggml.pre`, as llama.cpp names them."""


def gguf_tokenizer(file: GgufFile) -> Path | None:
    """Return a folder with the file's tokenizer and chat template, converted once into the cache.

    Returns:
        The folder, or None where the file has no vocabulary.

    Raises:
        SourceError: The tokenizer is of a kind that cannot be converted.
    """
    model = file.metadata.get("tokenizer.ggml.model")
    if model in (None, "no_vocab", "none"):
        return None
    folder = cache_folder() / "tokenizers" / f"{file.digest[:32]}-{LAYOUT}"
    if folder.is_dir():
        return folder
    try:
        tokenizer = _byte_level(file) if model == "gpt2" else _by_transformers(file)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError) as error:
        raise SourceError(
            f"The tokenizer of {file.path}, of kind {model!r}, cannot be converted: "
            f"{reason(error)}.",
            "Give the safetensors checkpoint of the model.",
        ) from error
    with new_entry(folder) as working:
        tokenizer.save_pretrained(working)
    return folder


def _special(file: GgufFile) -> dict[str, str]:
    """The special tokens by transformers' names."""
    tokens = file.expect("tokenizer.ggml.tokens", list)
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            special[f"{name}_token"] = tokens[number]
    return special


def _byte_level(file: GgufFile) -> Any:
    """A byte-level BPE tokenizer, built from the vocabulary, the merges and the splitting rule.

    transformers has this conversion too; it takes seconds, and in the supported releases it cuts
    digits of several models as GPT-2 does, which is not how these models were trained.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    entries = file.metadata
    tokens = file.expect("tokenizer.ggml.tokens", list)
    merges = [tuple(pair.split(" ")) for pair in file.expect("tokenizer.ggml.merges", list)]
    rule = entries.get("tokenizer.ggml.pre", "default")
    if rule not in SPLITTINGS:
        raise SourceError(
            f"The tokenizer of {file.path} splits text by the rule {rule!r}, which is not "
            "supported.",
            f"Known are {', '.join(sorted(SPLITTINGS))}; give the safetensors checkpoint of the "
            "model instead.",
        )
    splitting = SPLITTINGS[rule]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=splitting.whole_words))
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    kinds = entries.get("tokenizer.ggml.token_type", [])
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    special = _special(file)
    # llama.cpp adds the first token where the file says so, and for Llama 3 where it says nothing.
    adds_bos = entries.get("tokenizer.ggml.add_bos_token", splitting is _LLAMA3)
    if adds_bos and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, vocabulary[bos])],
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        chat_template=entries.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _by_transformers(file: GgufFile) -> Any:
    """A tokenizer of another kind (SentencePiece), as transformers converts it."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="graphopt-gguf-") as name:
        # Alone in a folder: a configuration that lies beside the file is none of it.
        (Path(name) / "model.gguf").symlink_to(file.path.resolve())
        return AutoTokenizer.from_pretrained(
            name, gguf_file="model.gguf", local_files_only=True, trust_remote_code=False
        )
