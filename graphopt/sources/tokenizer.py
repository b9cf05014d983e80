"""Tokenizers of model folders: which files they are, and loading them without running code.

transformers opens files by itself, follows links and paths in a tokenizer's configuration, and
asks on the terminal whether code may run. So it is given a private copy of those files that the
folder really holds, with everything taken out of the configuration that leads elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from graphopt.errors import GraphoptError, SourceError, first_line
from graphopt.files.confined import files_inside, inside
from graphopt.support.boundary import out_of_memory
from graphopt.support.inputs import (
    MAX_DIGITS,
    MAX_JSON_BYTES,
    OpenSchema,
    parse,
    parse_json,
    read_bytes,
)
from graphopt.support.plain import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PATTERNS = (
    "*.json", "*.txt", "*.model", "*.model.v*", "*.jinja", "*.tiktoken",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
# Descriptions of the model, which every emitter writes for itself, and a run's own records.
_OTHERS = (
    "config.json", "genai_config.json", "program.json", "report.json", "manifest.json",
    "generation_config.json", "program.txt",
)  # fmt: skip

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Of which a model that sees has one at least: how pixels are made of pictures."""

MAX_TOKENIZER_VALUES = 16_000_000
"""The most values in one JSON file; the largest known have 2 million, of tokens and merges."""

MAX_TOKEN_ID = 2**24
"""The tokenizers library takes memory for every number up to the largest id, held or not; the
largest known vocabularies have 262,144."""

# What the choice of a tokenizer's class hangs on, of the model's own config.
_CONFIG_KEYS = ("model_type", "model_name", "tokenizer_class", "transformers_version")


PROBE = "The 3 cats: \u00e9t\u00e9, \U0001f600.\n\tx"
"""What every tokenizer is tried with when it is read."""


def tokenizer_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a tokenizer as (name, path).

    Raises:
        SourceError: One is a link out of the folder, or no regular file.
    """
    for pattern in _PATTERNS:
        for path in files_inside(folder, pattern):
            if path.name not in _OTHERS and "safetensors" not in path.name:
                yield path.relative_to(folder).as_posix(), path


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder, as transformers loads it; no code of it runs.

    While its files stay as they are it is read once: one of 262,144 tokens takes seconds, and a
    compile asks for it several times. So those who get it must not change it.

    Raises:
        SourceError: It cannot be loaded, needs code of its own, or a file of it is a link out of
            the folder.
    """
    return _read(folder, tuple(_file_states(folder)))


def _file_states(folder: Path) -> Iterator[tuple[int, ...]]:
    """Yield what changes with any file that a tokenizer is made of."""
    config = [folder / "config.json"] if (folder / "config.json").exists() else []
    for path in [*(path for _, path in tokenizer_files(folder)), *config]:
        status = path.stat()
        yield status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=2)
def _read(folder: Path, _states: tuple[tuple[int, ...], ...]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with (
        private_copy(folder) as name,
        working(
            folder,
            "be loaded",
            "Put a tokenizer.json there that transformers loads without code of its own.",
            hidden=name,
        ),
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        )
        # A tokenizer that loads may yet fail at its first text.
        tokenizer.decode(tokenizer(PROBE)["input_ids"])
    tokenizer.name_or_path = str(folder)
    return tokenizer


@contextlib.contextmanager
def private_copy(folder: Path) -> Iterator[str]:
    """Give a folder with copies of the files that a tokenizer, or a processor, is made of.

    What leads out of the folder, and what names code, is taken out of their configurations.

    Raises:
        SourceError: A file is a link out of the folder, or no bounded JSON.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-tokenizer-") as name:
        private = Path(name)
        for place, path in tokenizer_files(folder):
            content = read_bytes(path, MAX_JSON_BYTES)
            if path.suffix == ".json":
                _check_json(path, content)
            target = private / place
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)
        _rewrite(private / "tokenizer_config.json", _without_paths)
        if (folder / "config.json").exists():
            config = read_bytes(inside(folder, "config.json"), MAX_JSON_BYTES)
            (private / "config.json").write_bytes(config)
            _rewrite(private / "config.json", _kind_alone)
        yield name


@contextlib.contextmanager
def working(folder: str | Path, doing: str, remedy: str, hidden: str = "") -> Iterator[None]:
    """Give what the tokenizers library says of a tokenizer its sentence.

    The library raises plain Exceptions, and panics that are not even those.

    Args:
        hidden: A path that the message is not to show.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GraphoptError):
        raise
    except BaseException as error:
        if out_of_memory(error):
            raise
        said = first_line(error).replace(hidden or str(folder), str(folder))
        raise SourceError(f"The tokenizer in {folder} cannot {doing}: {said}.", remedy) from error


OTHER_FILES = "Put the tokenizer files that belong to the model into its folder."


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Return the ids of a text.

    Args:
        tokenizer: A tokenizer of transformers.
        special: With the special tokens that it puts before and behind a text.

    Raises:
        SourceError: It fails, as a vocabulary without a token for what is unknown does at a letter
            that it lacks.
    """
    with working(tokenizer.name_or_path, f"encode {shown(text)}", OTHER_FILES):
        # `verbose` off: a text longer than the model's context is nothing to warn of.
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of ids, without special tokens.

    Raises:
        SourceError: It fails.
    """
    with working(tokenizer.name_or_path, "decode its own tokens", OTHER_FILES):
        return str(
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


Special = str | dict[str, Any] | None


class _TokenizerConfig(OpenSchema):
    """The entries of a tokenizer's configuration that code computes with."""

    model_max_length: Annotated[float, pydantic.Field(ge=1)] | None = None
    tokenizer_class: str | None = None
    chat_template: str | list[dict[str, str]] | dict[str, str] | None = None
    bos_token: Special = None
    eos_token: Special = None
    unk_token: Special = None
    pad_token: Special = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None
    padding_side: Literal["left", "right"] | None = None
    truncation_side: Literal["left", "right"] | None = None


def _check_json(path: Path, content: bytes) -> None:
    """Refuse a tokenizer's file that is no bounded JSON, or has ids or settings out of bounds."""
    data = parse_json(content, str(path), max_values=MAX_TOKENIZER_VALUES)
    if path.name == "tokenizer_config.json":
        parse(_TokenizerConfig, data, str(path))
    for token, number in _ids(path.name, data):
        if isinstance(number, int) and number > MAX_TOKEN_ID:
            raise SourceError(
                f"{path} gives the token {shown(token)} the id {number}, and ids go up to "
                f"{MAX_TOKEN_ID}.",
                OTHER_FILES,
            )


def _ids(name: str, data: Any) -> Iterator[tuple[str, Any]]:
    """Yield (token, id) of everything that a tokenizer's file numbers; other types as they are."""
    if not isinstance(data, dict):
        return
    vocabulary: Any = None
    if name in ("vocab.json", "added_tokens.json"):
        vocabulary = data
    elif name == "tokenizer.json":
        model = data.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        added = data.get("added_tokens")
        for entry in added if isinstance(added, list) else ():
            if isinstance(entry, dict):
                yield str(entry.get("content")), entry.get("id")
    elif name == "tokenizer_config.json":
        decoder = data.get("added_tokens_decoder")
        for key, entry in (decoder if isinstance(decoder, dict) else {}).items():
            if key.isdecimal() and isinstance(entry, dict):
                # int() of thousands of digits is refused by Python itself.
                yield str(entry.get("content")), int(key[:MAX_DIGITS])
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()


def _rewrite(path: Path, change: Any) -> None:
    """Change an object in a JSON file; leave it to transformers to refuse what is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(data, dict):
        path.write_text(json.dumps(change(data)), encoding="utf-8")


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's configuration without names of files.

    transformers finds a folder's files by their usual names; what stands in the configuration
    would be opened wherever it leads.
    """
    ends = ("_file", "_files", "_path", "_dir")
    return {
        key: value for key, value in config.items() if key != "init_inputs" and
        (not key.endswith(ends) or key == "name_or_path")
    }  # fmt: skip


def _kind_alone(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in _CONFIG_KEYS if isinstance(config.get(key), str)}
