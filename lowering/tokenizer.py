"""Copying a model's tokenizer into an artifact."""

from __future__ import annotations

import shutil
from pathlib import Path

from graphopt.ir.graph import Program
from graphopt.sources.tokenizer import tokenizer_files


def copy_tokenizer(program: Program, folder: Path) -> list[Path]:
    """Copy the tokenizer files of a program, and its generation defaults, into `folder`.

    Returns:
        The files written; none where the program has no tokenizer.

    Raises:
        SourceError: One of them is a link out of the tokenizer's folder.
    """
    if program.tokenizer is None:
        return []
    written: list[Path] = []
    for name, source in tokenizer_files(Path(program.tokenizer)):
        (folder / name).parent.mkdir(exist_ok=True)
        written.append(Path(shutil.copyfile(source, folder / name)))
    return written
