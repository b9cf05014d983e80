"""The command beside every kept result is a line that gives it again, wherever the clone lies."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from results import given_words, why_not_runnable  # noqa: E402

RESULTS = sorted((ROOT / "benchmarks").glob("*.json"))


def commands(found: Any) -> Iterator[str]:
    """Yield every command in kept results, however deep."""
    if isinstance(found, dict):
        for key, value in found.items():
            if key == "command":
                yield value
            else:
                yield from commands(value)
    elif isinstance(found, list):
        for value in found:
            yield from commands(value)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_commands_of_kept_results_are_lines_that_run(path: Path) -> None:
    told = list(commands(json.loads(path.read_text(encoding="utf-8"))))
    assert told
    assert [(command, why_not_runnable(command)) for command in told] == [
        (command, "") for command in told
    ]


@pytest.mark.parametrize(
    ("command", "reason"),
    [("tools/bench_demo.py", "not python"), ("", "not python"),
     ("python tools/bench_gone.py", "no file that there is"), ("python", "no file"),
     ("torchrun --nproc-per-node 2 bench_demo.py", "no file that there is"),
     ("python tools/bench_demo.py --calib /home/me/valid.txt", "one machine"),
     ("python tools/bench_demo.py --calib=/home/me/valid.txt", "one machine"),
     ("python tools/bench_demo.py --name demo, batch 1", "lacks quotes"),
     ("python tools/bench_demo.py --name 'demo", "No closing quotation"),
     ("graphopt compile demo -o ~/out", "one machine")],
)  # fmt: skip
def test_lines_that_do_not_run(command: str, reason: str) -> None:
    assert reason in why_not_runnable(command)


def test_what_a_bench_was_given_is_told_as_a_shell_reads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = ["--name", "demo, batch 1", "--calib", str(tmp_path / "valid.txt"), "a{b=1}"]
    monkeypatch.setattr(sys, "argv", ["tools/bench_demo.py", *given])
    assert given_words() == "--name 'demo, batch 1' --calib valid.txt 'a{b=1}'"
    assert why_not_runnable(f"python tools/bench_demo.py {given_words()}") == ""
