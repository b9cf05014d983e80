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
def test_damaged_inputs_end_in_a_sentence(tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, str(TOOL), "--seed", "14", "--count", "24", "--out", str(found)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.is_file(), done.stderr[-2000:]
    result = json.loads(found.read_text())
    assert result["failures"] == []
    assert sum(result["outcomes"].values()) == 24 and result["outcomes"]["refused"] > 5
