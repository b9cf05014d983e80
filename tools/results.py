"""Kept results, and how tables show them; imports nothing that computes."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def result_of(name: str) -> dict[str, Any]:
    """Return the results that a bench keeps under its name; none where it never ran."""
    path = ROOT / "benchmarks" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def given_words() -> str:
    """Return what this command was given, as words of a shell; absolute paths by their names."""
    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    return shlex.join(words)


def why_not_runnable(command: str) -> str:
    """Return what keeps a command of kept results from being a line of a shell in the repository.

    Returns:
        A clause; "" where it begins with python, torchrun or graphopt, names a file or module that
        there is, and no place of one machine.
    """
    try:
        program, *words = shlex.split(command) or [""]
    except ValueError as problem:
        return str(problem)
    if program not in ("python", "torchrun", "graphopt"):
        return f"{program!r} is not python, torchrun or graphopt"
    if any(word.startswith(("/", "~")) or "=/" in word for word in words):
        return "it names a place of one machine"
    if any(word.endswith(",") for word in words):
        return "a word that is no name of a shell lacks quotes"
    if (program == "python" and words[:1] != ["-m"]) or program == "torchrun":
        if not any((ROOT / word).is_file() for word in words if word.endswith(".py")):
            return "it names no file that there is"
    return ""


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
