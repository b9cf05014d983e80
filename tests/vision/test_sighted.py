"""Decoders of models that see: with pictures and without, as transformers computes them."""

from __future__ import annotations

import pytest
import torch
from sampling import exhaustive_but
from vision_models import FAMILIES, prompts, vision_model

import graphopt as go
from graphopt.execute.interpreter import Runner
from graphopt.generate.decoding import generate_ids
from graphopt.ir.sighted import EMBEDS, PICTURES, sighted
from graphopt.vision.sighted_model import SightedModel
from graphopt.vision.tower import VisionTower

# The others differ from llava in tower and merging alone.
SAMPLED = exhaustive_but(FAMILIES, "llava", "qwen2_vl", "smolvlm", "gemma3", "internvl")
COUNTS = {"one picture": [1], "two pictures": [2], "no picture": [0], "unequal": [1, 2]}


def close(found, want, mask):
    """Both compute in fp32: what is asked of them is 1e-4 of the largest logit."""
    real = mask.bool()
    limit = 1e-4 * float(want[real].abs().max())
    assert float((found - want)[real].abs().max()) <= limit


@pytest.fixture(scope="module")
def parts(vision_program):
    made = {}

    def of(family):
        if family not in made:
            program = vision_program(family)
            made[family] = vision_model(family), Runner(sighted(program)), VisionTower(program)
        return made[family]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLED)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_logits_are_those_of_transformers(parts, family, counts):
    model, runner, tower = parts(family)
    given = prompts(family, counts)
    with torch.no_grad():
        want = model(**given).logits
        inputs = tower.inputs(**given)
        found = runner.logits(inputs)
    close(found, want, given["attention_mask"])


@pytest.mark.parametrize("family", SAMPLED)
def test_text_alone_by_token_ids(parts, vision_program, family):
    model, runner, tower = parts(family)
    given = prompts(family, [0, 0])
    with torch.no_grad():
        want = model(**given).logits
    plain = {name: given[name] for name in ("input_ids", "attention_mask")}
    close(Runner(vision_program(family)).logits(plain), want, given["attention_mask"])
    close(runner.logits(tower.inputs(**plain)), want, given["attention_mask"])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_a_step_behind_a_prompt_with_pictures(parts, vision_program, family):
    """The cache of the sighted program goes on where its prompt ended."""
    model, _, tower = parts(family)
    program, _ = go.Pipeline.parse("canonicalise,insert-kv-cache").run(vision_program(family))
    runner = Runner(sighted(program))
    given = prompts(family, [1, 2])
    last = torch.tensor([[5], [7]])
    with torch.no_grad():
        model(**given)  # Qwen's counts its positions on from the prompt before
        inputs = tower.inputs(**given)
        _, past = runner.run(inputs)
        step = {"input_ids": last, EMBEDS: model.get_input_embeddings()(last)}
        step["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        places = inputs["position_ids"]
        newest = places.amax((0, 2) if places.dim() == 3 else 1) + 1
        step["position_ids"] = newest[:, None].expand(3, -1, -1) if places.dim() == 3 else (
            newest[:, None]
        )  # fmt: skip
        if PICTURES in inputs:
            step[PICTURES] = torch.nn.functional.pad(inputs[PICTURES], (0, 1), value=-1)
        found = runner.run(step, past)[0][0]
        longer = given | {
            "input_ids": torch.cat((given["input_ids"], last), 1),
            "attention_mask": step["attention_mask"],
        }
        for kinds in ("token_type_ids", "mm_token_type_ids"):
            if kinds in given:
                longer[kinds] = torch.nn.functional.pad(given[kinds], (0, 1))
        want = model(**longer).logits[:, -1:]
    close(found, want, torch.ones(2, 1))


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_writing_behind_pictures(vision_program, family):
    """Positions of three axes and masks of pictures go on as transformers' own generate has them.

    Greedy tokens of random models: the two highest logits lie further apart than fp32 rounds.
    """
    program, _ = go.Pipeline.parse("canonicalise,insert-kv-cache").run(vision_program(family))
    given = prompts(family, [2])
    length = given["input_ids"].shape[1]
    with torch.no_grad():
        want = vision_model(family).generate(**given, max_new_tokens=6, do_sample=False)
    model = SightedModel(program)
    ids = model.look_at(given)
    found = list(generate_ids(model, ids, stop={258}, max_new_tokens=6))
    assert found == [token for token in want[0, length:].tolist() if token != 258]


def test_printed_form(vision_program):
    """What changes for pictures is the input, the tables of three axes, and the masks."""
    qwen, gemma = (str(sighted(vision_program(f))) for f in ("qwen2_vl", "gemma3"))
    table = "axial_rope_table(position_ids, rope.inv_freq, time=2, height=1, width=1)"
    assert table in qwen and "position_ids: i64[3,B,S], inputs_embeds: f32[B,S,32])" in qwen
    assert "picture_mask(pictures, tokens, window=8)" in gemma
    assert "attention_mask, picture_mask, scale=0.3535533905932738, causal=False)" in gemma
    assert "embedding(" not in qwen + gemma and "pictures: i64[B,S]" in gemma


def test_what_capture_finds(vision_program):
    gemma, qwen, llava = (vision_program(f).vision for f in ("gemma3", "qwen2_vl", "llava"))
    assert gemma.both_ways and not qwen.both_ways and not llava.both_ways
    assert qwen.sections == (2, 1, 1) and gemma.sections is None and llava.sections is None
    assert gemma.embedding_scale == pytest.approx(32**0.5) and llava.embedding_scale == 1.0
    names = {weight.name for weight in llava.carried}
    assert "model.multi_modal_projector.linear_1.weight" in names
    assert not any("language_model" in name or "lm_head" in name for name in names)
