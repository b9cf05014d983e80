"""Compiles that learn from pictures, interrupted and taken up, and shared by ranks."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from picture_folders import save_with_pictures
from rank_commands import FAILING_PASS, command
from ranks import run_ranks
from safetensors.torch import load_file
from sampling import exhaustive_but
from typer.testing import CliRunner

from graphopt.cli.commands import app

pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.slow

RECIPE = (
    "prune-blocks{ratio=0.34,windows=3,seqlen=32},"
    "fuse-blocks{steps=4,seqlen=16,batch=2,rate=1e-2,warm_start=false}"
)
FAMILIES = exhaustive_but(["llava", "gemma3"], "llava")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = save_with_pictures(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """The options by which a compile has a pass that fails."""
    plugin = tmp_path_factory.mktemp("plugin") / "fail.py"
    plugin.write_text(FAILING_PASS)
    return ["--plugin", str(plugin)]


def arguments(folder, out, recipe, *more):
    return [
        "compile", str(folder / "model"), "-o", str(out), "--emit", "hf", "--passes", recipe,
        "--calib", str(folder / "text.txt"), "--calib-images", str(folder / "images"),
        "--device", "cpu", *more,
    ]  # fmt: skip


def compiled(*args):
    done = CliRunner().invoke(app, [*arguments(*args), "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def weights(out):
    return load_file(out / "hf" / "model.safetensors")


def resumed(report):
    return {entry["name"]: entry["resumed"] for entry in report["passes"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_interrupted_goes_on_with_its_pictures(tmp_path, folders, failing, family):
    folder = folders(family)
    compiled(folder, tmp_path / "whole", RECIPE)
    prune, fuse = RECIPE.split("},")
    broken, out = f"{prune}}},fail{{rank=0}},{fuse}", tmp_path / "out"
    done = CliRunner().invoke(app, arguments(folder, out, broken, *failing))
    assert done.exit_code == 1 and "The lamp is out." in done.stderr
    report = compiled(folder, out, RECIPE, "--resume")
    assert resumed(report)["prune-blocks"] and not resumed(report)["fuse-blocks"]
    assert "8 pictures" in report["calibration"]["pictures"]
    found = weights(out)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, found[name]), name


@pytest.mark.exhaustive
def test_other_pictures_are_another_run(tmp_path, folders, failing):
    """What was learnt from other pictures is not taken up."""
    folder = shutil.copytree(folders("llava"), tmp_path / "copy")
    prune, _ = RECIPE.split("},")
    broken, out = f"{prune}}},fail{{rank=0}}", tmp_path / "out"
    done = CliRunner().invoke(app, arguments(folder, out, broken, *failing))
    assert done.exit_code == 1
    (folder / "images" / "1.png").write_bytes((folder / "images" / "2.png").read_bytes())
    assert not resumed(compiled(folder, out, f"{prune}}}", "--resume"))["prune-blocks"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_share_pictures(tmp_path, folders, family):
    """Two ranks make what one process makes: of the trained weights see test_rank_passes.py."""
    folder = folders(family)
    alone = compiled(folder, tmp_path / "alone", RECIPE)
    shared = [*arguments(folder, tmp_path / "shared", RECIPE), "--json"]
    first, second = run_ranks(command, shared, group=False, limit=240)
    assert first.code == second.code == 0, first.stderr
    assert second.stdout == second.stderr == ""
    report = json.loads(first.stdout)
    assert report["calibration"] == alone["calibration"]
    for ours, theirs in zip(alone["passes"], report["passes"], strict=True):
        assert (ours["name"], ours["changed"]) == (theirs["name"], theirs["changed"])
    found = weights(tmp_path / "shared")
    for name, value in weights(tmp_path / "alone").items():
        apart = float((value - found[name]).norm() / value.norm().clamp(min=1e-30))
        assert apart <= 1.2e-4, name
