"""The steps of capture: named, counted, and dumped."""

from __future__ import annotations

import re

import pytest
from families import random_model

from graphopt.capture import capture
from graphopt.capture.steps import CaptureStep
from graphopt.compiler import CompileOptions, compile_model
from graphopt.ir.ops import is_aten


def steps_of(model) -> tuple[list[CaptureStep], object]:
    steps: list[CaptureStep] = []
    return steps, capture(model, watch=steps.append)


@pytest.mark.slow
def test_every_step_has_a_name_a_place_and_a_count():
    """Of a model whose layers are raised completely, rule by rule."""
    steps, program = steps_of(random_model("llama", num_hidden_layers=3))
    layer = [step for step in steps if step.where != "the model"]
    assert [step.name for step in layer] == [
        "merge-equal-constants", "canonicalise", "hoist", "raise-linears", "raise-norms",
        "raise-activations", "sink-reshape-below-linear", "raise-ropes", "raise-layout-ops",
        "raise-attention", "raise-layout-ops", "raise-masks",
    ]  # fmt: skip
    assert {step.where for step in layer} == {"model.layers.0"}
    done = {step.name: step for step in layer}
    # A norm before attention and one before the feed-forward part, whose activation is a product.
    assert done["raise-norms"].made == 2 and done["raise-activations"].made == 2
    assert done["raise-attention"].made == 1 and done["raise-ropes"].removed > 2
    assert "linear(" in done["canonicalise"].text
    assert "rms_norm(" in done["raise-norms"].text
    assert "rms_norm(" not in done["raise-linears"].text
    assert str(done["raise-norms"]) == (
        f"raise-norms in model.layers.0: 2 nodes made, {done['raise-norms'].removed} removed"
    )
    last = [node.op for f in program.functions.values() for node in f.nodes]
    assert not any(map(is_aten, last)) and steps[-1].name == "merge-layer-functions"


@pytest.mark.slow
def test_layers_of_two_kinds_have_steps_of_their_own():
    model = random_model("mistral", num_hidden_layers=2)
    steps, program = steps_of(model)
    watched = [step.where for step in steps]
    assert watched[0] == watched[-1] == "the model"
    text = str(program)
    assert str(capture(model)) == text  # watching changes nothing


@pytest.mark.slow
def test_a_compile_dumps_them(tmp_path):
    model = random_model("llama", num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model")
    options = CompileOptions(emit=("torch",), dump_ir=tmp_path / "ir", verify=False)
    compile_model(str(tmp_path / "model"), tmp_path / "out", options)
    names = sorted(path.name for path in (tmp_path / "ir" / "capture").iterdir())
    assert names[0] == "01-canonicalise.txt" and names[-1].endswith("-merge-layer-functions.txt")
    text = min((tmp_path / "ir" / "capture").glob("*-raise-norms.txt")).read_text()
    assert re.match(r"# raise-norms in model\.layers\.0: 2 nodes made, \d+ removed\n\ndef ", text)
