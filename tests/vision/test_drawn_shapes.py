"""The bench of a model that sees drawn shapes, with a model that is trained for a few steps."""

from __future__ import annotations

import argparse
import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("PIL.Image")


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


@pytest.mark.exhaustive
def test_the_bench_runs(tools, tmp_path):
    bench, shapes = tools("bench_vision"), tools("drawn_shapes")
    losses = shapes.train(tmp_path / "model", steps=2, blocks=3, width=32, batch=2)
    options = argparse.Namespace(
        model=tmp_path / "model", removed=1, fuse_steps=2, pictures=20, held_out=6, draws=2,
        trained_draws=1, seed=0,
    )  # fmt: skip
    found = bench.run(options, tmp_path)
    kinds = [(run["kind"], run["how"], run["learnt_from"]) for run in found["runs"]]
    both = "text and pictures"
    assert kinds == [
        *[("removed", "at random", "text")] * 2,
        ("chosen", "kl", "text"), ("chosen", "kl", both),
        ("chosen", "mi", "text"), ("chosen", "mi", both),
        ("trained", "distil", "text"), ("trained", "distil", both),
        ("trained", "published", "text"), ("trained", "published", both),
        ("trained", "published, random donor", both),
        ("trained at random", "distil", both),
    ]  # fmt: skip
    assert losses and found["blocks"] == 3
    assert all(run["pictures"] > 1 and run["text"] > 1 for run in found["runs"])
    assert all(len(run["removed"]) == 1 for run in found["runs"])


def test_sets_of_blocks_are_drawn(tools):
    drawn = tools("bench_vision").drawn_sets
    every = drawn(5, 2, 10)
    assert len(set(every)) == 10 and every != sorted(every)
    assert all(len(set(numbers)) == 2 and max(numbers) < 8 for numbers in drawn(8, 2, 7))
    assert len(drawn(8, 2, 7)) == 7
