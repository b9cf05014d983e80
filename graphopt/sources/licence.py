"""What a source states of its licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt.files.confined import inside
from graphopt.support.inputs import read_bytes
from graphopt.support.plain import plain_line

MODEL_CARD = "README.md"
"""The file whose header states the licence of a model on the hub."""

_MOST_CARD_BYTES, _MOST_LETTERS = 1 << 22, 300

_ENTRY = re.compile(r"^(license|license_name|license_link):[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


def stated_licence(folder: Path) -> str:
    """Return what the model card in a folder states of the licence; "" where there is none.

    Raises:
        SourceError: The card is a link out of the folder, or larger than any.
    """
    if not (folder / MODEL_CARD).exists():
        return ""
    card = read_bytes(inside(folder, MODEL_CARD), _MOST_CARD_BYTES).decode("utf-8", "replace")
    header = re.match(r"---\r?\n(.*?)\r?\n---\s", card, re.DOTALL)
    if header is None:
        return ""
    entries = {key: value.strip("'\"") for key, value in _ENTRY.findall(header[1])}
    return _joined(entries.get(key) for key in ("license", "license_name", "license_link"))


def gguf_licence(metadata: Mapping[str, Any]) -> str:
    """Return what a GGUF file states of the licence; "" for nothing."""
    keys = ("general.license", "general.license.name", "general.license.link")
    return _joined(metadata.get(key) for key in keys)


def _joined(entries: Any) -> str:
    texts = [
        plain_line(entry.encode("utf-8", "replace").decode())
        for entry in entries
        if isinstance(entry, str)
    ]
    return ", ".join(dict.fromkeys(filter(None, texts)))[:_MOST_LETTERS]
