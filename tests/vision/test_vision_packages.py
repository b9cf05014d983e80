"""Torch packages of models that see: pictures as embeddings, as transformers computes them."""

from __future__ import annotations

import pytest
import torch
from emitted import load_file
from sampling import exhaustive_but
from vision_models import FAMILIES, prompts, vision_model

import graphopt as go

# The others differ from llava in tower and merging alone.
SAMPLED = exhaustive_but(FAMILIES, "llava", "qwen2_vl", "gemma3")
COUNTS = {"one picture": [1], "two pictures": [2], "no picture": [0], "unequal": [1, 2]}
DEFAULT = "canonicalise,insert-kv-cache"


def close(found, want, mask):
    """Both compute in fp32: what is asked of them is 1e-4 of the largest logit."""
    real = mask.bool()
    limit = 1e-4 * float(want[real].abs().max())
    assert float((found - want)[real].abs().max()) <= limit


@pytest.fixture(scope="module")
def package(vision_program, tmp_path_factory):
    """Return the `model.py` of a family, its model, and its tower."""
    made = {}

    def of(family, recipe=DEFAULT, target="cpu"):
        key = family, recipe, target
        if key not in made:
            program, _ = go.Pipeline.parse(recipe).run(
                vision_program(family), go.RunOptions(verify=False)
            )
            out = tmp_path_factory.mktemp(family) / "out"
            go.emit(program, out, emit=("torch",), target=target)
            module = load_file(out / "model.py")
            model = module.load(out)
            made[key] = module, model, module.tower(model, out)
        return made[key]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLED)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_logits_are_those_of_transformers(package, family, counts):
    _, model, tower = package(family)
    given = prompts(family, counts)
    with torch.no_grad():
        want = vision_model(family)(**given).logits
        found, cache = model(**tower.embeddings(**given))
    close(found, want, given["attention_mask"])
    assert len(cache) == 3


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLED)
@pytest.mark.parametrize("recipe", [DEFAULT, "canonicalise"], ids=["cached", "uncached"])
def test_generating_behind_pictures(package, family, recipe):
    """Greedy tokens of random models: the two highest logits lie further apart than fp32 rounds."""
    module, model, tower = package(family, recipe)
    given = prompts(family, [1, 2])
    length = given["input_ids"].shape[1]
    with torch.no_grad():
        want = vision_model(family).generate(**given, max_new_tokens=6, do_sample=False)
    found = module.generate(model, count=6, stop=[258], **tower.embeddings(**given))
    for row, tokens in zip(want[:, length:].tolist(), found, strict=True):
        assert tokens == (row[: row.index(258)] if 258 in row else row)


@pytest.mark.parametrize("family", SAMPLED)
def test_text_by_token_ids(package, family):
    module, model, tower = package(family)
    given = prompts(family, [0, 0])
    with torch.no_grad():
        want = vision_model(family)(**given).logits
        found, _ = model(given["input_ids"], given["attention_mask"])
    close(found, want, given["attention_mask"])
    texts = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
    ]
    by_ids = module.generate(model, texts, 5)
    assert by_ids == module.generate(model, count=5, **tower.embeddings(**given))
