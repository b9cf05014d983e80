"""Checkpoints and output folders of models that see: what is around the decoder stays as it is."""

from __future__ import annotations

import pytest
import torch
from checkpoints import own_modules
from safetensors.torch import load_file
from sampling import exhaustive_but
from transformers import AutoModelForImageTextToText
from vision_models import FAMILIES, prompts, save_vision, vision_model

import graphopt as go
from graphopt.errors import UsageError
from graphopt.execute.interpreter import Runner
from graphopt.ir.blocks import remove_blocks
from graphopt.ir.sighted import sighted
from graphopt.vision.tower import VisionTower

# Keys that a family's checkpoints call otherwise, axes, masks and tied embeddings.
SAMPLED = exhaustive_but(FAMILIES, "llava", "qwen2_vl", "gemma3")
DEFAULT = "canonicalise,insert-kv-cache"


def load(folder, **options):
    """Return transformers' model of a checkpoint, which must miss nothing and know everything."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def bytes_of(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLED)
def test_the_checkpoint_that_was_read_is_written(tmp_path, family):
    source = save_vision(tmp_path / "source", family)
    program, _ = go.Pipeline.parse(DEFAULT).run(go.capture(str(source)))
    go.emit(program, tmp_path / "out", emit=("hf",))
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out" / "hf")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(bytes_of(value), bytes_of(after[name])), name
    again = go.capture(str(tmp_path / "out"))
    assert again.vision is not None and program.vision is not None
    assert [w.name for w in again.vision.carried] == [w.name for w in program.vision.carried]
    # Nothing is stored twice: what is around the decoder lies in the checkpoint.
    assert not (tmp_path / "out" / "vision.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLED)
def test_fewer_blocks_load_and_see(tmp_path, family, vision_program):
    program = vision_program(family).copy()
    remove_blocks(program, [1])
    go.emit(program, tmp_path / "out", emit=("hf",))
    model = load(tmp_path / "out" / "hf")
    assert model.config.get_text_config().num_hidden_layers == 2
    given = prompts(family, [1, 2])
    with torch.no_grad():
        want = model(**given).logits
        inputs = VisionTower(program).inputs(**given)
        found = Runner(sighted(program)).logits(inputs)
        written = model.generate(**given, max_new_tokens=3, do_sample=False)
    real = given["attention_mask"].bool()
    assert float((found - want)[real].abs().max()) <= 1e-4 * float(want[real].abs().max())
    assert torch.equal(written[:, given["input_ids"].shape[1]], want[:, -1].argmax(-1))
    assert written.shape[1] > given["input_ids"].shape[1]


@pytest.mark.slow
def test_the_tower_keeps_its_dtype(tmp_path):
    """Another dtype is asked for weights of the decoder; what is carried stays as it is."""
    source = save_vision(tmp_path / "source", "llava")
    options = go.CompileOptions(emit=("hf",), dtype="bfloat16")
    go.compile_model(str(source), tmp_path / "out", options)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out" / "hf")
    )
    for name, value in before.items():
        own = "language_model" in name or name == "lm_head.weight"
        wanted = value.bfloat16() if own else value
        assert torch.equal(bytes_of(wanted), bytes_of(after[name])), name
    load(tmp_path / "out" / "hf")


def test_an_output_folder_without_a_checkpoint_is_opened_again(tmp_path, vision_program):
    program = vision_program("gemma3")
    go.emit(program, tmp_path / "out", emit=("torch",))
    again = go.capture(str(tmp_path / "out"))
    given = prompts("gemma3", [2])
    with torch.no_grad():
        want, found = (
            Runner(sighted(p)).logits(VisionTower(p).inputs(**given)) for p in (program, again)
        )
    assert torch.equal(want, found)
    assert again.vision is not None and again.vision.both_ways


def error(found, want, given):
    """Return the largest error at real tokens in shares of the largest logit."""
    real = given["attention_mask"].bool()
    return float((found - want)[real].abs().max() / want[real].abs().max())


def seen(program, given):
    with torch.no_grad():
        return Runner(sighted(program)).logits(VisionTower(program).inputs(**given))


CARVED = {
    "chosen": "carve-moe{shared=1,active=1,experts=4,windows=4,seqlen=16}",
    "all experts active": (
        "carve-moe{shared=1,active=3,experts=4,windows=2,seqlen=16,reconstruct=false}"
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures(own_modules.__name__)
@pytest.mark.parametrize("family", exhaustive_but(FAMILIES, "gemma3"))
@pytest.mark.parametrize("how", exhaustive_but(CARVED, "all experts active"))
def test_carved_models_load_and_see(tmp_path, family, how, vision_program):
    """By the class that the checkpoint brings; with all experts active nothing has changed."""
    dense, given = vision_program(family), prompts(family, [1, 2])
    program, _ = go.Pipeline.parse(CARVED[how]).run(dense, go.RunOptions(verify=False))
    report = go.emit(program, tmp_path / "out", emit=("hf",))
    assert "AutoModelForImageTextToText.from_pretrained" in report.artifact.usage[0]
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForImageTextToText.from_pretrained(
            tmp_path / "out" / "hf", trust_remote_code=False
        )
    model = load(tmp_path / "out" / "hf", trust_remote_code=True)
    assert type(model).__name__.startswith("Carved")
    with torch.no_grad():
        found = model(**given).logits
        written = model.generate(**given, max_new_tokens=3, do_sample=False)
    assert error(found, seen(program, given), given) <= 1e-5
    assert written.shape[1] > given["input_ids"].shape[1]
    if how == "all experts active":
        with torch.no_grad():
            assert error(found, vision_model(family)(**given).logits, given) <= 1e-5
    again = go.capture(str(tmp_path / "out"))
    assert error(seen(again, given), found, given) <= 1e-5
    alone = go.capture(str(tmp_path / "out" / "hf"), trust_remote_code=True)
    text = {name: value for name, value in prompts(family, [0]).items() if name == "input_ids"}
    with torch.no_grad():
        want = model(**text).logits
        assert error(Runner(alone).logits(text), want, prompts(family, [0])) <= 1e-5
    with pytest.raises(UsageError, match=r"a class that its checkpoint brings \(auto_map\)"):
        VisionTower(alone)
