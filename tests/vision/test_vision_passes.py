"""Passes on decoders of models that see: run on text alone, and what they do to pictures."""

from __future__ import annotations

import pytest
import torch
import vision_models
from sampling import exhaustive_but
from transformers import AutoModelForImageTextToText
from vision_models import prompts, save_vision

import graphopt as go
from graphopt.execute.interpreter import Runner
from graphopt.ir.sighted import sighted
from graphopt.vision.tower import VisionTower

OPTIONS = go.RunOptions(verify=False)
FAMILIES = ("llava", "qwen2_vl", "gemma3")


def seen(program, family):
    """Return the logits of two prompts with one picture and with two, and which are real."""
    given = prompts(family, [1, 2])
    with torch.no_grad():
        logits = Runner(sighted(program)).logits(VisionTower(program).inputs(**given))
    return logits, given["attention_mask"].bool()


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(FAMILIES, "gemma3"))
@pytest.mark.parametrize(
    "recipe",
    [
        "canonicalise,common-subexpression-elimination,fold-constants,dead-code-elimination,"
        "insert-kv-cache",
        "carve-moe{shared=1,active=3,experts=4,windows=2,seqlen=16,reconstruct=false}",
    ],
    ids=["default", "all experts active"],
)
def test_what_changes_nothing_changes_no_picture(vision_program, family, recipe):
    before, real = seen(vision_program(family), family)
    program, _ = go.Pipeline.parse(recipe).run(vision_program(family), OPTIONS)
    after, _ = seen(program, family)
    assert float((after - before)[real].abs().max()) <= 1e-5 * float(before[real].abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(vision_models.FAMILIES, "qwen2_vl"))
def test_pruned_and_fused_and_quantised(tmp_path, family):
    source = save_vision(tmp_path / "source", family)
    recipe = "prune-blocks{ratio=0.34,windows=2,seqlen=32},fuse-blocks{steps=2,seqlen=32}"
    options = go.CompileOptions(emit=("hf",), recipe=go.Pipeline.parse(recipe), verify=False)
    go.compile_model(str(source), tmp_path / "out", options)
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out" / "hf", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.get_text_config().num_hidden_layers == 1
    given = prompts(family, [1, 2])
    with torch.no_grad():
        want = model.eval()(**given).logits
        written = model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    found, real = seen(go.capture(str(tmp_path / "out")), family)
    assert float((found - want)[real].abs().max()) <= 1e-4 * float(want[real].abs().max())
    new = written[:, given["input_ids"].shape[1] :]
    assert new.shape[1] == 3
    first = want[:, -1].clone()
    first[:, 258] = float("-inf")  # which would end the text
    assert torch.equal(new[:, 0], first.argmax(-1))
    quantised, _ = go.Pipeline.parse("quantize{w=4,group=16}").run(
        go.capture(str(tmp_path / "out")), OPTIONS
    )
    rounded, _ = seen(quantised, family)
    assert float((rounded - found)[real].abs().max()) > 0
