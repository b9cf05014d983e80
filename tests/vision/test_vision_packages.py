"""Torch packages of models that see: pictures as embeddings, as transformers computes them."""

from __future__ import annotations

import pytest
import torch
from emitted import load_file
from sampling import exhaustive_but
from vision_models import FAMILIES, prompts, save_vision, vision_model

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


WIDE = {
    "llava": {"head_dim": 32},
    "gemma3": {"head_dim": 32},
    "qwen2_vl": {
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4],
        },
    },
}  # fmt: skip
"""Text configs of which kernels take the heads."""


def emitted_wide(family, folder, target):
    """Return a package for a GPU, of fp32 weights, and the model that it is of."""
    program = go.capture(str(save_vision(folder / "source", family, **WIDE[family])))
    program, _ = go.Pipeline.parse(DEFAULT).run(program, go.RunOptions(verify=False))
    report = go.emit(program, folder / "out", emit=("torch",), target=target, dtype="float32")
    return load_file(folder / "out" / "model.py"), vision_model(family, **WIDE[family]), report


def steps_of(decoder, prompt, tokens):
    """Return the logits [B, vocab] behind a prompt and behind each of further tokens [B]."""
    decoder.look(**prompt)
    found = [decoder.logits.float().cpu().clone()]
    for token in tokens:
        decoder.step(token.tolist())
        found.append(decoder.logits.float().cpu().clone())
    return torch.stack(found, 1)


def steps_wanted(model, given, tokens):
    """Return what transformers gives in one pass over prompt and tokens."""
    more = torch.stack(tokens, 1)
    ones = torch.ones_like(more)
    longer = given | {"input_ids": torch.cat((given["input_ids"], more), 1)}
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in given:
            new = ones if name == "attention_mask" else 0 * ones
            longer[name] = torch.cat((given[name], new), 1)
    with torch.no_grad():
        return model(**longer).logits[:, -1 - more.shape[1] :]


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(WIDE, "gemma3"))
@pytest.mark.parametrize("target", exhaustive_but(["ampere", "hopper", "volta"], "hopper"))
def test_packages_for_a_gpu(tmp_path, family, target):
    """Their caches of fixed room are read on a CPU here, by the reference of the kernels."""
    module, eager, report = emitted_wide(family, tmp_path, target)
    told = [entry.reason for entry in report.artifact.notes if "both ways" in entry.reason]
    assert len(told) == (family == "gemma3")
    model = module.load(tmp_path / "out", device="cpu")
    given = prompts(family, [1, 2])
    prompt = module.tower(model, tmp_path / "out").embeddings(**given)
    tokens = [torch.tensor([5, 7]), torch.tensor([9, 11])]
    decoder = module.Decoder(model, given["input_ids"].shape[1] + 4, 2)
    want = steps_wanted(eager, given, tokens)
    close(steps_of(decoder, prompt, tokens), want, torch.ones(2, 3))
    # Behind it, a text begins where texts begin.
    texts = [[1, 2, 3], [4]]
    assert decoder.start(texts) == [row[0] for row in module.generate(model, texts, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("family", WIDE)
def test_packages_on_a_gpu(tmp_path, family):
    """By kernels in 16 bits and recorded steps: a step is off by roundings of half a percent."""
    module, eager, _ = emitted_wide(family, tmp_path, "hopper")
    model = module.load(tmp_path / "out", device="cuda")
    given = prompts(family, [1, 2])
    prompt = module.tower(model, tmp_path / "out").embeddings(**given)
    assert prompt["inputs_embeds"].is_cuda
    tokens = [torch.tensor([5, 7]), torch.tensor([9, 11]), torch.tensor([3, 4])]
    decoder = module.Decoder(model, given["input_ids"].shape[1] + 5, 2)
    want = steps_wanted(eager, given, tokens)
    found = steps_of(decoder, prompt, tokens)
    assert decoder.graphs and float((found - want).abs().max()) <= 0.03 * float(want.abs().max())
    answers = module.generate(model, count=4, **prompt)
    assert [len(answer) for answer in answers] == [4, 4]
