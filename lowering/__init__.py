"""Emitters: a folder a family; each is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from graphopt.errors import unknown_name
from graphopt.lowering.base import Emitted, Emitter
from graphopt.storage.stored_weight import StoredWeight

_EMITTERS = {
    "gguf": ("graphopt.lowering.gguf", "GgufEmitter"),
    "hf": ("graphopt.lowering.hf", "HfEmitter"),
    "onnx": ("graphopt.lowering.onnx", "OnnxEmitter"),
    "torch": ("graphopt.lowering.torch", "TorchEmitter"),
}


def emitter_names() -> list[str]:
    """Return the names `--emit` takes."""
    return sorted(_EMITTERS)


def get_emitter(name: str, **options: Any) -> Emitter:
    """Return the emitter called `name`, made with its own options.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in _EMITTERS:
        raise unknown_name("output form", name, _EMITTERS)
    module, attribute = _EMITTERS[name]
    emitter: Emitter = getattr(importlib.import_module(module), attribute)(**options)
    return emitter


__all__ = ["Emitted", "Emitter", "StoredWeight", "emitter_names", "get_emitter"]
