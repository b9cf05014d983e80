"""No folder imports from one above it: the table of docs/architecture.md, read and enforced."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "graphopt": "graphopt",
    "lowering": "graphopt.lowering",
    "passes": "graphopt.passes",
    "runtime": "graphopt.runtime",
}
"""Folder at the top of the repository -> the package that it is."""

EVERYWHERE = {"errors", "support"}
ROW = re.compile(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", re.MULTILINE)


def table() -> dict[str, set[str]]:
    """Folder -> the folders that it may import from, from the bottom to the top."""
    allowed: dict[str, set[str]] = {}
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for folder, imports in ROW.findall(text):
        named = set(allowed) if imports.strip() == "all" else set(re.findall(r"`(\w+)`", imports))
        allowed[folder] = named
    return allowed


def sources() -> dict[str, Path]:
    """Module -> its file."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imported(text: str) -> Iterator[str]:
    """Every module that a source imports of graphopt, also within functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module.split(".")[0] == "graphopt":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "graphopt")


def forbidden(module: str, text: str, allowed: Mapping[str, set[str]]) -> list[str]:
    """The folders that a module imports from and may not."""
    own = module.split(".")[1]
    rooms = {name.split(".")[1] for name in imported(text) if "." in name}
    return sorted((rooms & set(allowed)) - {own} - EVERYWHERE - allowed[own])


def test_every_folder_has_a_row() -> None:
    rooms = {name.split(".")[1] for name in sources() if "." in name}
    assert rooms == set(table())


def test_the_table_has_no_circle() -> None:
    below: set[str] = set()
    for folder, imports in table().items():
        assert imports <= below, f"{folder} imports from {imports - below}, which are not below it"
        below.add(folder)


@pytest.mark.slow
def test_folders_import_from_below_alone() -> None:
    allowed = table()
    wrong = {
        name: found
        for name, path in sources().items()
        if "." in name and (found := forbidden(name, path.read_text(encoding="utf-8"), allowed))
    }
    assert not wrong


@pytest.mark.slow
def test_every_allowed_import_is_used() -> None:
    used: dict[str, set[str]] = {}
    for name, path in sources().items():
        if "." in name:
            rooms = {m.split(".")[1] for m in imported(path.read_text(encoding="utf-8"))}
            used.setdefault(name.split(".")[1], set()).update(rooms)
    surplus = {folder: imports - used[folder] for folder, imports in table().items()}
    assert not {f: s for f, s in surplus.items() if s and f != "cli"}


def test_a_planted_import_is_found() -> None:
    allowed = table()
    for text in (
        "from graphopt.passes import dead_code_elimination",
        "from graphopt import passes",
        "import graphopt.passes.dead_code_elimination",
        "def late():\n    from graphopt.passes.dead_code_elimination import DeadCodeElimination",
    ):
        assert forbidden("graphopt.ir.graph", text, allowed) == ["passes"]
    passes = "graphopt.passes.dead_code_elimination"
    assert forbidden(passes, "from graphopt.ir import graph", allowed) == []


def test_long_modules_say_why_they_are_one_file() -> None:
    """A file has one purpose and at most 450 lines; a longer one says why in its first text."""
    texts = {module: path.read_text(encoding="utf-8") for module, path in sources().items()}
    heads = {
        module: ast.get_docstring(ast.parse(text)) or ""
        for module, text in texts.items()
        if text.count("\n") > 450
    }
    unexplained = [m for m, head in heads.items() if not re.search(r"one\s+file|as\s+one", head)]
    assert not unexplained, "split them by purpose"
