"""GGUF models: a header as a transformers config, tensors under checkpoint names, a tokenizer."""

from __future__ import annotations

from pathlib import Path

from graphopt.sources.base import Kind, ModelSource, common_dtype
from graphopt.sources.gguf.architectures import find_architecture, gguf_config
from graphopt.sources.gguf.container import read_gguf
from graphopt.sources.gguf.generation import gguf_generation
from graphopt.sources.gguf.tokenizer import gguf_tokenizer
from graphopt.sources.gguf.vocabulary import read_vocabulary
from graphopt.sources.gguf.weights import gguf_producers
from graphopt.sources.licence import gguf_licence

__all__ = ["open_gguf"]


def open_gguf(spec: str, path: Path, kind: Kind = "gguf", name: str = "") -> ModelSource:
    """Open a .gguf file.

    Args:
        spec: What the user named.
        path: The file.
        kind: "demo" for the embedded model.
        name: Short name; by default the file's.

    Raises:
        SourceError: The file is damaged, its architecture or tokenizer is not supported, or it
            states something that may change the model's numbers and is not read.
    """
    file = read_gguf(path)
    find_architecture(file)
    vocabulary = read_vocabulary(file)
    config = gguf_config(file, vocabulary)
    producers = gguf_producers(file, config)
    return ModelSource(
        spec=spec,
        name=name or path.stem,
        kind=kind,
        config=config,
        producers=producers,
        tokenizer=gguf_tokenizer(file, vocabulary),
        generation=gguf_generation(file, vocabulary),
        dtype=common_dtype(producers),
        licence=gguf_licence(file.metadata),
    )
