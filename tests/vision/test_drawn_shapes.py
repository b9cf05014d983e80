"""The bench of a model that sees drawn shapes, with a model that is trained for a few steps."""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL.Image")
TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tools(monkeypatch):
    """Return the tools' modules by name, which are no part of the package."""
    monkeypatch.syspath_prepend(TOOLS)
    yield importlib.import_module
    for name in ("drawn_shapes", "bench_vision"):
        sys.modules.pop(name, None)


def test_scenes_are_drawn_as_they_are_told(tools):
    shapes = tools("drawn_shapes")
    for scene in shapes.scenes(20, 0):
        picture = torch.from_numpy(np.array(shapes.draw(scene)))
        (x, y), (other_x, other_y) = shapes.PLACES[scene[3]]
        assert bool((picture[y, x] != 0).any()) and bool((picture[other_y, other_x] != 0).any())
        told = shapes.caption(scene).split()
        assert told[0] == "a" and set(scene[:3]) <= set(told) and told[-1] == scene[6]
    assert len(set(shapes.scenes(50, 1))) > 40
    assert list(itertools.islice(shapes.scenes(5, 2), 2)) == list(shapes.scenes(2, 2))


@pytest.mark.slow
def test_the_bench_runs(tools, tmp_path):
    bench, shapes = tools("bench_vision"), tools("drawn_shapes")
    losses = shapes.train(tmp_path / "model", steps=2, blocks=3, width=32, batch=2)
    options = argparse.Namespace(
        model=tmp_path / "model", removed=1, fuse_steps=1, pictures=20, held_out=6, seeds=1, seed=0
    )
    found = bench.run(options, tmp_path)
    names = [run["name"] for run in found["runs"]]
    assert names == [
        "random 0", "chosen by text", "chosen by text and pictures", "chosen and trained by text",
        "chosen and trained by text and pictures",
    ]  # fmt: skip
    assert losses and found["blocks"] == 3
    assert all(run["pictures"] > 1 and run["text"] > 1 for run in found["runs"])
