"""The tables of the documentation are those that the results under benchmarks/ give."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_tables_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the tool's module, which is no part of the package."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("model_tables")


def a_run(method: str, times: float) -> dict[str, object]:
    said = [f"{method}: left alone"]
    return {"method": method, "perplexity": 20 * times, "times_dense": times, "said": said}


def test_a_method_is_marked_where_its_median_is_no_better_than_a_control(
    tables: ModuleType,
) -> None:
    runs = [a_run("random", times) for times in (1.4, 1.5, 9.0)]
    runs += [a_run("chosen", 1.5), a_run("tuned", 1.2)]
    runs.append({"method": "experts", "refused": "there are none"})
    methods = {"random": [], "chosen": ["random"], "tuned": ["random", "chosen"], "experts": []}
    part = {"dense": {"perplexity": 20.0}, "blocks": 8, "runs": runs, "methods": methods}
    assert tables.not_better(part, "chosen") == ["random"]
    assert tables.not_better(part, "tuned") == tables.not_better(part, "random") == []
    assert tables.told(part, "chosen") == ["chosen: left alone"]
    assert tables.told(part, "experts") == ["there are none"]
    lines = tables.methods_on_models({"tiny": part}).splitlines()
    assert "| random | 1.500 (1.400 to 9.000) |" in lines
    assert "| chosen | 1.500 \\* |" in lines
    assert "| experts | - |" in lines
