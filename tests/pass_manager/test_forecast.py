"""What a dry run says of passes that it does not run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from command_line import runner
from programs import tiny_program
from tiny_models import save_tiny

import graphopt as go
from graphopt.cli.commands import app
from graphopt.ir import Program, Weight
from graphopt.pass_manager import forecast
from graphopt.pass_manager.contract import make_pass
from graphopt.pass_manager.forecast import forecast_recipe
from graphopt.pass_manager.pipeline import Pipeline

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that multiplies a thousand million numbers a second, and weights unread."""
    monkeypatch.setattr(forecast, "flops_per_second", lambda device: 1e9)
    monkeypatch.setattr(Weight, "load", lambda *_: pytest.fail("a weight was read"))


def told(recipe: str, program: Program) -> forecast.RecipeForecast:
    return forecast_recipe(Pipeline.parse(recipe).passes, program, CPU, verify=True)


@pytest.mark.parametrize(
    ("options", "left", "what"),
    [
        ("ratio=0.5", 2, "takes out 2 of 4 blocks, chosen by kl"),
        ("blocks=1", 3, "takes out 1 of 4 blocks, chosen by kl"),
        ("remove=[1]", 3, "takes out 1 of 4 blocks: layers.1"),
    ],
)
def test_blocks_that_go(options: str, left: int, what: str) -> None:
    program = tiny_program(layers=4)
    expected = told(f"prune-blocks{{{options}}},insert-kv-cache", program)
    assert [entry.what for entry in expected.passes] == [what]
    # What is left has the parameters, and the caches, of as many blocks.
    assert expected.program.parameter_count() == tiny_program(layers=left).parameter_count()
    assert len(expected.program.states) == left
    assert len(program.states) == 0 and program.parameter_count() > 0


def test_parts_of_blocks_that_go() -> None:
    expected = told("prune-blocks{blocks=2,part=attention}", tiny_program(layers=4))
    assert expected.passes[0].what == "takes out 2 of 4 attentions, chosen by kl"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (
            "shared=3,active=2,experts=8",
            "divides 2 feed-forward parts of 48 neurons into 8 groups of 6: 3 shared, and 5 of "
            "which a token runs 2",
        ),
        (
            "shared=6,active=0,experts=8",
            "leaves 6 of 8 groups of 6 neurons in 2 feed-forward parts of 48 neurons",
        ),
    ],
)
def test_parts_that_are_carved(options: str, what: str) -> None:
    assert told(f"carve-moe{{{options}}}", tiny_program()).passes[0].what == what


def test_training_takes_the_time_that_it_is_given() -> None:
    alone = told("prune-blocks{blocks=1}", tiny_program(layers=4))
    expected = told("prune-blocks{blocks=1},fuse-blocks{seconds=40}", tiny_program(layers=4))
    assert expected.passes[1].what == "trains the 3 blocks that are left for 40 s"
    assert expected.seconds["passes"] == pytest.approx(alone.seconds["passes"] + 40)
    assert expected.memory > alone.memory > 0


def test_more_text_takes_longer_and_exact_passes_take_none() -> None:
    few = told("prune-blocks{blocks=1,windows=2}", tiny_program(layers=4)).seconds["passes"]
    many = told("prune-blocks{blocks=1,windows=8}", tiny_program(layers=4)).seconds["passes"]
    assert many == pytest.approx(4 * few) and few > 0
    recipe = Pipeline.default().passes
    proved = forecast_recipe(recipe[:-1], tiny_program(), CPU, verify=True)
    assert proved.seconds == {"passes": 0.0, "verify": 0.0} and not proved.passes
    compared = forecast_recipe(recipe, tiny_program(), CPU, verify=True).seconds
    assert compared["passes"] == 0 < compared["verify"]  # with a cache a program has other inputs
    assert forecast_recipe(recipe, tiny_program(), CPU, verify=False).seconds["verify"] == 0


def test_a_pass_that_tells_nothing() -> None:
    item = make_pass("prune-blocks", {"blocks": 1})
    silent = go.Pass.forecast(item, tiny_program(), CPU)
    assert (silent.what, silent.left, silent.seconds) == ("", None, 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forecast") / "tiny"
    save_tiny(folder)
    return folder


@pytest.mark.slow
def test_the_command_says_it(model: Path, tmp_path: Path) -> None:
    options = ["compile", str(model), "-o", str(tmp_path / "out"), "--dry-run"]
    options += ["--emit", "onnx,torch", "--dtype", "bfloat16", "--passes", "prune-blocks{blocks=1}"]
    result = runner().invoke(app, options)
    assert result.exit_code == 0, result.output
    lines = [re.sub(r"\s+", " ", line) for line in result.stdout.splitlines()]
    assert "will do prune-blocks: takes out 1 of 2 blocks, chosen by kl" in lines
    for label in ("time about ", "memory about ", "size onnx about ", "size torch about "):
        assert any(line.startswith(label) for line in lines), label
    assert not (tmp_path / "out").exists()
    data = json.loads(runner().invoke(app, [*options, "--json"]).stdout)
    estimate = data["estimate"]
    assert set(estimate["seconds"]) == {"capture", "passes", "verify", "emit"}
    assert all(seconds >= 0 for seconds in estimate["seconds"].values())
    onnx, torch_form = estimate["forms"]
    assert onnx["dtype"] == "bf16" and torch_form["shared_bytes"] == pytest.approx(
        onnx["bytes"], rel=0.01
    )
    # One of two blocks is left, in 16 bits.
    whole = sum(weight.numel for weight in go.capture(str(model)).used_weights())
    assert 0.4 * 2 * whole < onnx["bytes"] < 0.9 * 2 * whole
