"""ONNX folders of models that see: three graphs in a row give transformers' logits."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from sampling import exhaustive_but
from vision_models import FAMILIES, IMAGE, prompts, vision_model

import graphopt as go
from graphopt.backends.onnx_artifact import OnnxArtifactModel
from graphopt.backends.onnx_tower import OnnxTower
from graphopt.backends.opening import open_language_model
from graphopt.errors import UsageError
from graphopt.generate.decoding import generate_ids
from graphopt.vision.sighted_model import SightedModel

# Two tell all features: patches of any grid with positions of three axes, and attention both ways.
SAMPLED = exhaustive_but(FAMILIES, "qwen2_5_vl", "gemma3")
COUNTS = {"one picture": [1], "two pictures": [2], "no picture": [0], "unequal": [1, 2]}


@pytest.fixture(scope="module")
def folders(vision_program, tmp_path_factory):
    made = {}

    def of(family, recipe="canonicalise,insert-kv-cache"):
        if (family, recipe) not in made:
            program, _ = go.Pipeline.parse(recipe).run(vision_program(family))
            out = tmp_path_factory.mktemp(family) / "out"
            made[family, recipe] = out, go.emit(program, out, emit=("onnx",)), program
        return made[family, recipe]

    return of


class Chain:
    """The three graphs, and nothing but ONNX Runtime between pixels and logits."""

    def __init__(self, folder):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.vision, self.embedding, self.decoder = (
            ort.InferenceSession(str(folder / name), options)
            for name in ("vision.onnx", "embedding.onnx", "model.onnx")
        )

    def features(self, tower, **given):
        """Return what the tower's graph makes, arranged as transformers arranges it."""
        made = tower.inputs(**given)
        return made["inputs_embeds"][given["input_ids"] == IMAGE], made

    def logits(self, tower, **given):
        features, made = self.features(tower, **given)
        ids = given["input_ids"].numpy()
        feeds = {name: value.numpy() for name, value in made.items()}
        feeds["inputs_embeds"] = self.embedding.run(
            None, {"input_ids": ids, "image_features": features.numpy()}
        )[0]
        taken = {}
        for item in self.decoder.get_inputs():
            if item.name in feeds:
                taken[item.name] = feeds[item.name]
            else:
                taken[item.name] = np.zeros((len(ids), item.shape[1], 0, item.shape[3]), np.float32)
        return torch.from_numpy(self.decoder.run(["logits"], taken)[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLED)
def test_logits_are_those_of_transformers(folders, family):
    out, _, program = folders(family)
    model, chain, tower = (
        vision_model(family),
        Chain(out / "onnx"),
        OnnxTower(program, out / "onnx"),
    )
    for counts in COUNTS.values():
        given = prompts(family, counts)
        real = given["attention_mask"].bool()
        with torch.no_grad():
            want = model(**given).logits[real]
        found = chain.logits(tower, **given)[real]
        # Both compute in fp32: what is asked of them is 1e-4 of the largest logit.
        assert float((found - want).abs().max()) <= 1e-4 * float(want.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLED)
def test_writing_behind_pictures(folders, family):
    """Greedy tokens: the two highest logits of these models lie further apart than fp32 rounds."""
    out, _, program = folders(family)
    given = prompts(family, [2])
    length = given["input_ids"].shape[1]
    with torch.no_grad():
        want = vision_model(family).generate(**given, max_new_tokens=6, do_sample=False)
    form = OnnxArtifactModel(out / "onnx", config=program.config)
    model = SightedModel(program, form, tower=OnnxTower(program, out / "onnx"))
    ids = model.look_at(given)
    found = list(generate_ids(model, ids, stop={258}, max_new_tokens=6))
    assert found == [token for token in want[0, length:].tolist() if token != 258]
    assert model.backend == "onnx"


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLED)
def test_text_alone(folders, family):
    """The folder is a language model as others are, in two steps and from padded rows."""
    out, _, _ = folders(family)
    given = prompts(family, [0, 0])
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        want = vision_model(family)(**given).logits
    model = open_language_model(str(out), "onnx")
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, parts = model.start(2), []
    for part in (slice(0, 8), slice(8, None)):
        inputs = {"input_ids": ids[:, part], "position_ids": places[:, part]}
        inputs["attention_mask"] = mask[:, : part.stop]
        logits, cache = model.step(inputs, cache)
        parts.append(logits)
    found, real = torch.cat(parts, 1), mask.bool()
    assert float((found - want)[real].abs().max()) <= 1e-4 * float(want[real].abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(FAMILIES, "llava"))
def test_a_pruned_decoder(folders, family):
    """And one without a KV cache, which reads all embeddings for every token."""
    from graphopt.execute.interpreter import Runner
    from graphopt.ir.sighted import sighted
    from graphopt.vision.tower import VisionTower

    out, _, program = folders(family, "canonicalise,prune-blocks{blocks=1}")
    given = prompts(family, [1, 2])
    real = given["attention_mask"].bool()
    inputs = VisionTower(program).inputs(**given)
    want = Runner(sighted(program)).logits(inputs)[real]
    tower = OnnxTower(program, out / "onnx")
    found = Chain(out / "onnx").logits(tower, **given)[real]
    assert float((found - want).abs().max()) <= 1e-4 * float(want.abs().max())
    assert len({call.path for call in program.calls if ".layers." in call.path}) == 2


def with_marks(given, start=292, end=293):
    """Put tokens around pictures, as Qwen's processor does; onnxruntime-genai finds them so."""
    ids = []
    for token, before in zip(given["input_ids"][0], [None, *given["input_ids"][0]], strict=False):
        own, was = token == IMAGE, before == IMAGE
        ids += [start] if own and not was else [end] if was and not own else []
        ids.append(int(token))
    marked = torch.tensor([ids])
    kinds = {"mm_token_type_ids": (marked == IMAGE).long()}
    return given | {"input_ids": marked, "attention_mask": torch.ones_like(marked)} | kinds


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    exhaustive_but(("qwen2_5_vl", "gemma3", "qwen2_vl", "mistral3"), "qwen2_5_vl", "gemma3"),
)
def test_onnxruntime_genai_reads_the_folder(folders, family):
    """With two pictures, with one, and with text alone; logits and greedy tokens."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    out, _, _ = folders(family)
    model, loaded = vision_model(family), og.Model(str(out / "onnx"))
    assert loaded.type == {"qwen2_vl": "qwen2_5_vl"}.get(family, family)
    for count in (2, 1, 0):
        given = prompts(family, [count])
        given = with_marks(given) if "image_grid_thw" in given else given
        length = given["input_ids"].shape[1]
        with torch.no_grad():
            want = model(**given).logits[0, -1]
            written = model.generate(**given, max_new_tokens=4, do_sample=False)[0, length:]
        params = og.GeneratorParams(loaded)
        params.set_search_options(max_length=length + 4, do_sample=False)
        generator = og.Generator(loaded, params)
        if count:
            tensors = og.NamedTensors()
            tensors["input_ids"] = given["input_ids"].int().numpy()
            tokens = int((given["input_ids"] == IMAGE).sum()) // count
            tensors["num_image_tokens"] = np.array([tokens] * count, np.int64)
            for name in ("pixel_values", "image_grid_thw", "image_sizes"):
                if name in given:
                    tensors[name] = given[name].numpy()
            generator.set_inputs(tensors)
        else:
            generator.append_tokens(given["input_ids"][0].tolist())
        found = torch.from_numpy(generator.get_logits()[0, -1])
        assert float((found - want).abs().max()) <= 1e-4 * float(want.abs().max())
        tokens = []
        while not generator.is_done() and len(tokens) < 4:
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        assert tokens == written.tolist()[: len(tokens)]


@pytest.mark.slow
def test_what_a_folder_says(folders):
    out, _, _ = folders("gemma3")
    settings = json.loads((out / "onnx" / "genai_config.json").read_text())["model"]
    assert settings["vision"]["filename"] == "vision.onnx"
    assert settings["embedding"]["outputs"] == {"inputs_embeds": "inputs_embeds"}
    out, report, program = folders("llava")
    settings = json.loads((out / "onnx" / "genai_config.json").read_text())["model"]
    assert settings["type"] == "llama" and "vision" not in settings
    told = " ".join(entry.reason for entry in report.artifact.notes)
    assert "onnxruntime-genai has no type for llava and reads text alone" in told
    # The table of words lies in one file, once, and the tower's weights are nowhere else.
    names = {path.name for path in (out / "onnx").iterdir()}
    assert {"vision.onnx", "vision.onnx.data", "embedding.onnx", "model.onnx.data"} <= names
    places = json.loads((out / "program.json").read_text())["storage"]
    table = program.weights["model.language_model.embed_tokens.weight"]
    assert "onnx/model.onnx.data" in json.dumps(places[table.name])
    assert "onnx/vision.onnx.data" in json.dumps(
        places["model.multi_modal_projector.linear_1.weight"]
    )
    again = go.capture(str(out))
    for weight in program.vision.carried:
        assert torch.equal(again.vision.carried[weight.name].load(), weight.load())


@pytest.mark.slow
def test_a_tower_without_a_graph(vision_program, tmp_path, monkeypatch):
    """Decoder and words are written, and the reason is told."""
    from graphopt.lowering.onnx import sighted as parts

    def fails(program):
        raise parts.CaptureError("the tower cannot be traced", "")

    monkeypatch.setattr(parts, "tower_program", fails)
    report = go.emit(vision_program("llava"), tmp_path / "out", emit=("onnx",))
    assert not (tmp_path / "out/onnx/vision.onnx").exists()
    assert (tmp_path / "out/onnx/embedding.onnx").exists()
    assert any("no vision.onnx: the tower cannot" in note.reason for note in report.artifact.notes)
    with pytest.raises(UsageError, match=r"has no vision\.onnx"):
        OnnxTower(vision_program("llava"), tmp_path / "out/onnx")


@pytest.mark.slow
def test_a_decoder_that_takes_no_embeddings(vision_program, tmp_path):
    """A policy of the KV cache has no form in which pictures are seen both ways."""
    policy = "attach-kv-policy{kind=quest,budget=64,page=16,sink=16,local=16,verdict=ignore}"
    program, _ = go.Pipeline.parse(f"canonicalise,insert-kv-cache,{policy}").run(
        vision_program("gemma3"), go.RunOptions(verify=False)
    )
    report = go.emit(program, tmp_path / "out", emit=("onnx",))
    (told,) = (note.reason for note in report.artifact.notes if "alone" in note.reason)
    assert told.startswith("it takes token ids alone. ") and "see each other both ways" in told
    assert not (tmp_path / "out/onnx/embedding.onnx").exists()
    model = open_language_model(str(tmp_path / "out"), "onnx")
    assert len(list(generate_ids(model, [5, 6, 7], stop=set(), max_new_tokens=3))) == 3


@pytest.mark.slow
def test_memory_of_a_folder(folders):
    """Positions of three axes and embeddings are made up, as token ids are."""
    from typer.testing import CliRunner

    from graphopt.cli.commands import app

    out, _, _ = folders("qwen2_5_vl")
    result = CliRunner().invoke(app, ["memory", str(out), "--out", str(out.parent / "page.html")])
    assert result.exit_code == 0, result.output
