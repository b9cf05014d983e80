"""Kept results, and how tables show them; imports nothing that computes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def result_of(name: str) -> dict[str, Any]:
    """Return the results that a bench keeps under its name; none where it never ran."""
    path = ROOT / "benchmarks" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_on(result: dict[str, Any], *packages: str) -> str:
    """Return the sentence on when, where, with what and by which command something was measured."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in packages)
    return (
        f"Measured on {result['date']}, {result['device']}, with {versions}: `{result['command']}`."
    )
