"""Completion in a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.cli.completion import complete_pass, complete_recipe, complete_target

SCRIPT = """
source <(graphopt --show-completion bash)
for line in "graphopt com" "graphopt compile --em" "graphopt passes prune-b" \\
    "graphopt compile demo --target ho"; do
    read -ra COMP_WORDS <<< "$line"
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _graphopt_completion graphopt
    echo "${COMPREPLY[@]}"
done
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_commands_options_passes_and_targets() -> None:
    tools = Path(sys.executable).parent
    if not (tools / "graphopt").exists():
        pytest.skip("graphopt is not installed beside this Python")
    settings = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", SCRIPT], env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["compile", "--emit", "prune-blocks", "hopper"]


def test_the_last_pass_of_a_recipe_is_completed() -> None:
    assert complete_recipe("canon") == ["canonicalise"]
    begun = "prune-blocks{ratio=0.2,windows=4},fu"
    assert complete_recipe(begun) == ["prune-blocks{ratio=0.2,windows=4},fuse-blocks"]
    assert complete_recipe("prune-blocks{ratio=0.2,f") == []
    assert complete_pass("prune-") == ["prune-blocks", "prune-experts"]
    assert complete_target("v") == ["volta"] and "cpu" in complete_target("")
