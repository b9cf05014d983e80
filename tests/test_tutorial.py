"""The tutorial runs as it is written, and its notebook is made of it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import notebook  # noqa: E402

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def test_the_notebook_is_made_of_the_page() -> None:
    made = (ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8")
    assert made == notebook.notebook_of(PAGE), "run python tools/notebook.py"


def follow(page: str, clone: Path) -> str:
    """Do what a page says, in a clone; return all that was printed."""
    shutil.copytree(ROOT / "docs", clone / "docs", ignore=shutil.ignore_patterns("*.png"))
    shutil.copytree(ROOT / "examples", clone / "examples")
    shutil.copy(ROOT / "README.md", clone)
    script = ["import subprocess"]
    for language, text in notebook.cells_of(page):
        if language == "bash" and not text.startswith("pip install"):
            script.append(f"subprocess.run({text!r}, shell=True, check=True)")
        elif language == "python":
            script.append(text)
    tools = Path(sys.executable).parent
    settings = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    # To files: where the page fails midway, its server would hold pipes open.
    printed, said = clone / "stdout.txt", clone / "stderr.txt"
    with printed.open("w") as stdout, said.open("w") as stderr:
        running = subprocess.Popen(
            [sys.executable, "-c", "\n".join(script)],
            cwd=clone, env=settings, stdout=stdout, stderr=stderr, start_new_session=True,
        )  # fmt: skip
        code = running.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    assert code == 0, said.read_text()
    return printed.read_text()


@pytest.mark.exhaustive
@pytest.mark.network
def test_the_tutorial_runs(tmp_path: Path, demo: str) -> None:
    pytest.importorskip("onnxruntime_genai")
    printed = follow(PAGE, tmp_path)
    assert "Paris" in printed and "27 layers" in printed
    times = [float(x) for x in re.findall(r"perplexity is ([\d.]+) times the source's", printed)]
    assert max(times) > 1 and all(0.9 < x < 2 for x in times)


@pytest.mark.exhaustive
def test_the_tutorial_runs_on_another_model(tmp_path: Path) -> None:
    """As many commands in a minute: of a tiny model, and without training."""
    pytest.importorskip("onnxruntime_genai")
    model = save_tiny(tmp_path / "tiny", num_hidden_layers=5)
    page = PAGE.replace("demo", str(model)).replace("{seconds=90}", "{steps=1,seqlen=16}")
    page = page.replace("--seqlen 512", "--seqlen 16")
    assert "4 layers" in follow(page, tmp_path / "clone")
