"""Copying a model's tokenizer into an artifact."""

from __future__ import annotations

import shutil
from pathlib import Path

from graphopt.ir.graph import Program

_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
# Descriptions of the model, which every emitter writes for itself.
_OTHERS = ("config.json", "genai_config.json", "program.json", "report.json", "manifest.json")


def copy_tokenizer(program: Program, folder: Path) -> list[Path]:
    """Copy the tokenizer files of a program, and its generation defaults, into `folder`.

    Returns:
        The files written; none where the program has no tokenizer.
    """
    if program.tokenizer is None:
        return []
    written: list[Path] = []
    for pattern in _PATTERNS:
        for source in sorted(Path(program.tokenizer).glob(pattern)):
            if source.name not in _OTHERS and "safetensors" not in source.name:
                written.append(Path(shutil.copyfile(source, folder / source.name)))
    return written
