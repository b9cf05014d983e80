"""What a model is before it is captured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from graphopt.files.confined import folder_inside
from graphopt.ir.weights import Producer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from graphopt.ir.graph import Program

Kind = Literal["hf", "gguf", "demo", "config", "program"]


@dataclass
class ModelSource:
    """A model, opened: its description, and its weights unread.

    Attributes:
        spec: What the user named.
        name: Short name for reports and artifacts.
        kind: What it was read from.
        config: transformers config; None for a saved program.
        producers: Checkpoint tensor name -> where its value comes from; empty for a bare config
            and for a saved program.
        tokenizer: Folder with tokenizer files that transformers loads; None if there is none.
        generation: How text is to be generated, in the words of generation_config.json.
        dtype: dtype of most of the floating-point weights.
        program: The program of a graphopt output folder; None for every other kind.
        licence, licence_files: As `Program` has them.
        notes: What a user should know of how its weights are read.
        out_by_in: Weights that are [out, in] also where the class has [in, out], by name.
    """

    spec: str
    name: str
    kind: Kind
    config: PretrainedConfig | None = None
    producers: dict[str, Producer] = field(default_factory=dict)
    tokenizer: Path | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    program: Program | None = None
    licence: str = ""
    licence_files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    out_by_in: frozenset[str] = frozenset()


def common_dtype(producers: Mapping[str, Producer]) -> torch.dtype:
    """Return the floating-point dtype that most elements have; fp32 where there are none."""
    counts: dict[torch.dtype, int] = {}
    for producer in producers.values():
        if producer.dtype.is_floating_point:
            elements = 1
            for size in producer.shape:
                elements *= size
            counts[producer.dtype] = counts.get(producer.dtype, 0) + elements
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def tokenizer_in(folder: Path) -> Path | None:
    """Return `folder` where it holds a tokenizer, else None."""
    return folder if any((folder / name).exists() for name in TOKENIZER_FILES) else None


def output_tokenizer(root: Path, program: Program) -> Path | None:
    """Return the folder with the tokenizer of a graphopt output, or None.

    Args:
        root: The output folder, whose own copies come first.
        program: The program saved in it, which may name the folder it was compiled from.

    Raises:
        SourceError: One of the folders in it is a link out of it.
    """
    own = [folder for name in ("onnx", "hf") if (folder := folder_inside(root, name)) is not None]
    named = [Path(program.tokenizer)] if program.tokenizer else []
    return next(filter(tokenizer_in, (root, *own, *named)), None)
