"""The examples of docs/ir.md run."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "ir.md").read_text(encoding="utf-8")


def test_examples_run():
    scope = {"__name__": __name__}
    for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(code, "docs/ir.md", "exec", dont_inherit=True), scope)
