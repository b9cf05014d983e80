"""Emitted artifacts as modules of Python."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def load_file(path: Path) -> ModuleType:
    """Import a `model.py` under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"emitted_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
