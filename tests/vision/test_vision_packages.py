"""Torch packages of models that see: pictures as embeddings, as transformers computes them."""

from __future__ import annotations

import pytest
import torch
from emitted import load_file
from sampling import exhaustive_but
from tiny_models import tiny_model
from vision_models import FAMILIES, pixels, prompts, save_vision, vision_model

import graphopt as go
from graphopt.backends.torch_artifact import TorchArtifactModel
from graphopt.execute.interpreter import Runner
from graphopt.generate.decoding import generate_ids
from graphopt.ir.sighted import sighted
from graphopt.vision.sighted_model import SightedModel
from graphopt.vision.tower import VisionTower

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
@pytest.mark.parametrize("family", exhaustive_but(FAMILIES, "qwen2_vl", "gemma3"))
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
@pytest.mark.filterwarnings("ignore:attention on a CPU runs by its reference")
@pytest.mark.parametrize("family", exhaustive_but(WIDE, "gemma3"))
@pytest.mark.parametrize("target", exhaustive_but(["ampere", "hopper", "volta"], "ampere"))
def test_packages_for_a_gpu(tmp_path, family, target):
    """Their caches of fixed room are read on a CPU here, by the reference of the kernels."""
    module, eager, report = emitted_wide(family, tmp_path, target)
    told = [entry.reason for entry in report.artifact.notes if "both ways" in entry.reason]
    assert len(told) == (family == "gemma3")
    model = module.load(tmp_path / "out", device="cpu")
    given = prompts(family, [1, 2])
    tower = module.tower(model, tmp_path / "out")
    prompt = tower.embeddings(**given)
    tokens = [torch.tensor([5, 7]), torch.tensor([9, 11])]
    decoder = module.Decoder(model, given["input_ids"].shape[1] + 4, 2)
    want = steps_wanted(eager, given, tokens)
    close(steps_of(decoder, prompt, tokens), want, torch.ones(2, 3))
    # graphopt's own decoding goes the same way.
    program = go.capture(str(tmp_path / "out"))
    form = TorchArtifactModel(tmp_path / "out", program)
    sees, one = SightedModel(program, form), prompts(family, [2])
    assert form.start_text(8).sees
    written = list(generate_ids(sees, sees.look_at(one), stop=(), max_new_tokens=4))
    assert [written] == module.generate(model, count=4, **tower.embeddings(**one))
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


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(["llava", "qwen2_vl", "gemma3"], "gemma3"))
@pytest.mark.parametrize(
    "recipe",
    [
        "canonicalise,common-subexpression-elimination,fold-constants,dead-code-elimination,"
        "insert-kv-cache",
        "carve-moe{shared=1,active=3,experts=4,windows=2,seqlen=16,reconstruct=false},"
        "insert-kv-cache",
    ],
    ids=["default", "all experts active"],
)
def test_what_changes_nothing_changes_no_picture(package, family, recipe):
    given = prompts(family, [1, 2])
    real = given["attention_mask"].bool()
    before, after = (
        model(**tower.embeddings(**given))[0]
        for _, model, tower in (package(family, "canonicalise"), package(family, recipe))
    )
    assert float((after - before)[real].abs().max()) <= 1e-5 * float(before[real].abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(["llava", "qwen2_vl", "gemma3"], "qwen2_vl"))
def test_pruned_and_quantised(vision_program, tmp_path, family):
    """The package computes what the program with pictures does."""
    recipe = "prune-blocks{ratio=0.34,windows=2,seqlen=32},quantize{w=4,group=16},insert-kv-cache"
    program, _ = go.Pipeline.parse(recipe).run(vision_program(family), go.RunOptions(verify=False))
    assert 0 < len(program.states) < 3
    go.emit(program, tmp_path / "out", emit=("torch",))
    module = load_file(tmp_path / "out" / "model.py")
    model, given = module.load(tmp_path / "out"), prompts(family, [1, 2])
    found, _ = model(**module.tower(model, tmp_path / "out").embeddings(**given))
    with torch.no_grad():
        want = Runner(sighted(program)).logits(VisionTower(program).inputs(**given))
    close(found, want, given["attention_mask"])


@pytest.mark.slow
def test_windows_in_rings(package):
    """Of a layer with a window the cache keeps the last tokens; a picture is cut by both alike."""
    given = prompts("gemma3", [2, 1])
    answers = [
        module.generate(model, count=6, **tower.embeddings(**given))
        for module, model, tower in (
            package("gemma3"),
            package("gemma3", "canonicalise,insert-kv-cache{ring=true}"),
        )
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "llava",
            {"inputs_embeds": torch.zeros(1, 3, 7)},
            r"is \[1, 3, 7\]: this model takes",
        ),
        ("llava", {"inputs_embeds": None}, "give either ids or inputs_embeds"),
        ("llava", {"ids": [1, 2]}, "give either ids or inputs_embeds"),
        ("llava", {"attention_mask": torch.tensor([[1, 1, 0]])}, "padded in front"),
        ("llava", {"attention_mask": torch.ones(1, 2)}, r"is \[1, 2\]: give \[1,3\]"),
        ("qwen2_vl", {"position_ids": None}, r"without position_ids: this model takes \[3,B,S\]"),
        ("qwen2_vl", {"position_ids": torch.zeros(2, 1, 3)}, r"is \[2, 1, 3\]: this model takes"),
        ("gemma3", {"pictures": torch.zeros(1, 2)}, r"pictures is \[1, 2\]: give \[B,P\+S\]"),
    ],
)
def test_embeddings_that_do_not_fit(package, family, change, message):
    module, model, _ = package(family)
    given = {"count": 2, "inputs_embeds": torch.zeros(1, 3, 32)}
    if family == "qwen2_vl":
        given["position_ids"] = torch.arange(3).expand(3, 1, 3)
    module.generate(model, **given)
    with pytest.raises(ValueError, match=message):
        module.generate(model, **given | change)


def test_pictures_that_do_not_fit(package):
    _, _, tower = package("llava")
    given = prompts("llava", [2]) | pixels("llava", [1])
    with pytest.raises(tower.Error, match="The pictures do not fit the prompts"):
        tower.embeddings(**given)


def test_a_model_of_text_takes_none(tmp_path):
    go.emit(go.capture(tiny_model()), tmp_path / "out", emit=("torch",))
    text = (tmp_path / "out" / "model.py").read_text()
    assert "inputs_embeds" not in text and "--image" not in text
    assert not (tmp_path / "out" / "pictures").exists()


@pytest.mark.slow
def test_what_takes_token_ids_alone_says_why(tmp_path, vision_program):
    policy = "kind=sink-local,budget=8,page=4,sink=4,local=4,verdict=ignore"
    recipe = f"insert-kv-cache,attach-kv-policy{{{policy}}}"
    reports = {}
    for family in ("gemma3", "qwen2_vl"):
        program, _ = go.Pipeline.parse(recipe).run(
            vision_program(family), go.RunOptions(verify=False)
        )
        reports[family] = go.emit(program, tmp_path / family, emit=("torch",))
    (told,) = (n.reason for n in reports["gemma3"].artifact.notes if n.where == "torch")
    assert "takes token ids alone: model.language_model.layers.2: pictures that are seen" in told
    assert "have no form in its policy_attention" in told
    assert "inputs_embeds" not in (tmp_path / "gemma3" / "model.py").read_text()
    # A policy selects among keys, whatever they are of.
    module = load_file(tmp_path / "qwen2_vl" / "model.py")
    model = module.load(tmp_path / "qwen2_vl")
    prompt = module.tower(model, tmp_path / "qwen2_vl").embeddings(**prompts("qwen2_vl", [1]))
    assert len(module.generate(model, count=4, **prompt)[0]) == 4
