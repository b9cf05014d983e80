"""A few tries of `tools/fuzz_inputs.py`: damaged inputs of every format end in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "fuzz_inputs.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="tries run in forked processes")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited by Linux")
@pytest.mark.parametrize("count", [8, pytest.param(120, marks=pytest.mark.exhaustive)])
def test_damaged_inputs_end_in_a_sentence(count, tmp_path):
    found = tmp_path / "found.json"
    options = {"seed": 14, "count": count, "out": found}
    command = [sys.executable, str(TOOL)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.is_file(), done.stderr[-2000:]
    result = json.loads(found.read_text())
    assert result["failures"] == []
    assert sum(result["outcomes"].values()) == count and result["outcomes"]["refused"] > count // 5
