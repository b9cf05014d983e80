"""Checkpoints of quantised weights, read as those of a model some of whose weights are packed.

What a tool calls a layer's parts, how it orders codes in words and what it takes from zero points
is known here alone: the rest sees weights under the names that a dense checkpoint has. Nothing is
rounded again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graphopt.files.confined import inside
from graphopt.sources.quantised.awq import Awq
from graphopt.sources.quantised.compressed_tensors import CompressedTensors
from graphopt.sources.quantised.float8 import Float8
from graphopt.sources.quantised.gptq import Gptq
from graphopt.sources.quantised.method import Method, ReadTensors
from graphopt.support.inputs import read_json

__all__ = ["ENTRY", "METHODS", "Method", "ReadTensors", "stated_method"]

ENTRY = "quantization_config"
"""Where a config.json says how weights are quantised."""

METHODS: dict[str, Callable[[str, Mapping[str, Any]], Method]] = {
    "awq": Awq.of,
    "compressed-tensors": CompressedTensors.of,
    "fbgemm_fp8": Float8.of,
    "fp8": Float8.of,
    "gptq": Gptq.of,
}
"""The methods that are read, by what configs call them."""

_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which AutoGPTQ and AutoAWQ state what they did, for folders whose config does not."""


def stated_method(folder: Path, config: Mapping[str, Any]) -> Method | None:
    """Return how the weights of a folder are quantised; None where nothing that is read says so.

    Args:
        config: The content of config.json.

    Raises:
        SourceError: What says so is malformed, or states a form of the method that is not read.
    """
    entries = config.get(ENTRY)
    if isinstance(entries, dict):
        method = METHODS.get(str(entries.get("quant_method")))
        return None if method is None else method(f"{folder / 'config.json'}: {ENTRY}", entries)
    for name, usual in _OWN_FILES.items():
        if (folder / name).exists():
            stated = read_json(inside(folder, name))
            if isinstance(stated, dict):
                method = METHODS.get(str(stated.get("quant_method", usual)))
                return None if method is None else method(str(folder / name), stated)
    return None
