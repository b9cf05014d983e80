"""Processors of models that see, which make pixels of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphopt.errors import SourceError, first_line
from graphopt.sources.tokenizer import private_copy
from graphopt.support.boundary import out_of_memory


def read_processor(folder: Path) -> Any:
    """Return the processor of a model folder, as transformers loads it; no code of it runs.

    Raises:
        SourceError: transformers cannot load it.
    """
    from transformers import AutoProcessor

    with private_copy(folder) as name:
        try:
            return AutoProcessor.from_pretrained(
                name, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            if out_of_memory(error):
                raise
            said = first_line(error).replace(name, str(folder))
            raise SourceError(
                f"The processor in {folder} cannot be loaded: {said}.",
                "Install what it names; reading pictures needs Pillow (the extra `vision`).",
            ) from error
