"""What a GGUF file says of generation, in the words of generation_config.json."""

from __future__ import annotations

from typing import Any

from graphopt.sources.generation import GenerationSettings
from graphopt.sources.gguf.container import GgufFile
from graphopt.sources.gguf.vocabulary import Vocabulary
from graphopt.support.inputs import parse, shown_path

_SAMPLING = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "temp": "temperature",
    "penalty_repeat": "repetition_penalty",
}
"""Keys under `general.sampling.`, and what generation_config.json calls them."""


def gguf_generation(file: GgufFile, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Return the tokens that begin, end and pad texts, and how tokens are drawn.

    Raises:
        SourceError: A value is of a wrong type or out of range.
    """
    found: dict[str, Any] = {}
    if vocabulary is not None:
        for name in ("bos", "pad"):
            found[f"{name}_token_id"] = vocabulary.special.get(name)
        found["eos_token_id"] = vocabulary.ends or None
    for key, name in _SAMPLING.items():
        found[name] = file.metadata.get(f"general.sampling.{key}")
    # llama.cpp always draws, with its own defaults; a file that states some asks for it.
    if any(found[name] is not None for name in ("temperature", "top_k", "top_p", "min_p")):
        found["do_sample"] = found["temperature"] != 0
    found = {name: value for name, value in found.items() if value is not None}
    parse(GenerationSettings, found, shown_path(file.path), remedy="Convert the model again.")
    return found
