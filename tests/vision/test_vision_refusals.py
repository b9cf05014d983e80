"""What models with pictures cannot do yet, and pictures that do not fit: a sentence each."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from vision_models import IMAGE, QWEN, SIGLIP, TEXT, pixels, prompts

import graphopt as go
from graphopt.capture.vision import language_decoder
from graphopt.errors import CaptureError, UsageError
from graphopt.ir.sighted import sighted
from graphopt.vision.tower import VisionTower


def save(folder, model_type, **entries):
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **entries))
    model.save_pretrained(folder)
    return str(folder)


def test_features_added_inside_layers(tmp_path):
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                       "mrope_section": [2, 1, 1]}}  # fmt: skip
    tower = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
             "out_hidden_size": 32, "patch_size": 4, "deepstack_visual_indexes": [0]}  # fmt: skip
    folder = save(tmp_path, "qwen3_vl", text_config=text, vision_config=tower, **QWEN)
    with pytest.raises(CaptureError, match=r"takes deepstack_visual_embeds.*DeepStack"):
        go.capture(folder)


@pytest.mark.slow
def test_masks_of_another_kind(tmp_path):
    text = {"model_type": "gemma", **TEXT}
    folder = save(
        tmp_path, "paligemma", text_config=text, vision_config=SIGLIP, image_token_index=IMAGE,
        projection_dim=32,
    )  # fmt: skip
    with pytest.raises(CaptureError, match="neither causal nor both ways within a picture"):
        go.capture(folder)


def test_a_layout_without_a_decoder_of_its_own():
    class Whole(nn.Module):
        def get_decoder(self):
            return self

    with pytest.raises(CaptureError, match=r"Whole: no part of it .* its layout is unknown"):
        language_decoder(Whole())


def test_a_model_of_text_takes_no_pictures():
    program = go.capture(tiny_model())
    for make in (sighted, VisionTower):
        with pytest.raises(UsageError, match="is a model of text alone and takes no pictures"):
            make(program)


@pytest.mark.parametrize("count", [0, 2])
def test_prompts_with_other_numbers_of_image_tokens(count, vision_program):
    given = prompts("llava", [count]) | pixels("llava", [1])
    with pytest.raises(UsageError, match="The pictures do not fit the prompts"):
        VisionTower(vision_program("llava")).inputs(**given)


def test_token_ids_read_twice(vision_program):
    program = vision_program("llava").copy()
    call, function = program.calls[0], program.functions["embed"]
    embedding = next(node for node in function.nodes if node.op == "embedding")
    again = function.add("embedding", list(embedding.inputs))
    total = function.add("add", [embedding.output, again.output])
    function.results = [total.output if v is embedding.output else v for v in function.results]
    assert call.function == "embed"
    with pytest.raises(UsageError, match="token ids are read by embedding, embedding"):
        sighted(program)


@pytest.mark.slow
def test_attention_by_a_policy_has_no_form_both_ways(vision_program):
    policy = "kind=sink-local,budget=8,page=4,sink=4,local=4,verdict=ignore"
    recipe = f"insert-kv-cache,attach-kv-policy{{{policy}}}"
    program, _ = go.Pipeline.parse(recipe).run(vision_program("gemma3"))
    assert any(n.op == "policy_attention" for f in program.functions.values() for n in f.nodes)
    with pytest.raises(UsageError, match=r"policy_attention has no form in which the tokens"):
        sighted(program)
