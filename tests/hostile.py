"""Changing the files of a model folder, as one who wants harm would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Edit = Callable[[dict[str, Any]], Any]


def change(folder: Path, edit: Edit, name: str = "program.json") -> None:
    """Change a JSON file of a folder."""
    path = folder / name
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")
