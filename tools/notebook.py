"""Make docs/tutorial.ipynb of docs/tutorial.md: text is text, and code that is run is a cell.

python tools/notebook.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
_FENCED = re.compile(r"^```(bash|python)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def cells_of(page: str) -> Iterator[tuple[str, str]]:
    """Yield the parts of a page in their order, as (`markdown`, `bash` or `python`, text)."""
    end = 0
    for block in _FENCED.finditer(page):
        if text := page[end : block.start()].strip():
            yield "markdown", text
        yield block[1], block[2].strip()
        end = block.end()
    if text := page[end:].strip():
        yield "markdown", text


_BEGINNING = """\
# The cells below run in the clone. Where the notebook is all there is, such as on a hosted machine,
# clone the repository beside it first: !git clone URL graphopt
import os

if not os.path.exists("constraints.txt"):
    os.chdir("graphopt" if os.path.exists("graphopt/constraints.txt") else "..")"""


def notebook_of(page: str) -> str:
    """Return a page as a notebook (nbformat 4.5): commands stand behind an exclamation mark."""
    title, *rest = cells_of(page)
    cells: list[dict[str, Any]] = []
    for number, (language, text) in enumerate([title, ("python", _BEGINNING), *rest]):
        if language == "bash":
            # A line behind a backslash belongs to the command in front.
            text = "!" + re.sub(r"(?<!\\)\n", "\n!", text)
        cell: dict[str, Any] = {"cell_type": "markdown" if language == "markdown" else "code"}
        cell |= {"id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        if cell["cell_type"] == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    (DOCS / "tutorial.ipynb").write_text(notebook_of(page), encoding="utf-8")


if __name__ == "__main__":
    main()
