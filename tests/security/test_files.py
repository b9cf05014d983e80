"""No byte from outside a model folder is read or copied, whatever names and links are in it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hostile import change
from programs import tiny_program
from tiny_models import byte_tokenizer, save_tiny

import graphopt as go
from graphopt.backends.onnx_artifact import OnnxArtifactModel
from graphopt.backends.opening import open_language_model
from graphopt.errors import GraphoptError, SourceError
from graphopt.execute.language_model import load_tokenizer
from graphopt.files.confined import files_inside, folder_inside, inside
from graphopt.lowering.tokenizer import copy_tokenizer
from graphopt.sources import open_model
from graphopt.sources.tokenizer import read_tokenizer

SECRET = "a secret of the user"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the user, beside the model folder."""
    path = tmp_path / "secret.txt"
    path.write_text(SECRET)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def as_cache(model: Path, repository: str = "models--owner--name") -> Path:
    """Lay a model out as huggingface_hub's cache does; return the snapshot."""
    base = model.parent / repository
    snapshot = base / "snapshots" / "0123abcd"
    (base / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.move(path, base / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


# The reader itself ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../secret.txt", "a/../../secret.txt", "..", "", ".", "/etc/passwd", "//etc/passwd",
     "..\\secret.txt", "C:\\secret.txt", "C:secret.txt", "a\0b", "a/.."],
)  # fmt: skip
def test_names_that_lead_out(model: Path, secret: Path, name: str) -> None:
    with pytest.raises(SourceError, match=r"names the file .*, which is not one below it"):
        inside(model, name)


@pytest.mark.parametrize("kind", ["absolute", "relative", "chain", "folder", "hidden"])
def test_links_that_lead_out(model: Path, secret: Path, kind: str) -> None:
    name = "link"
    if kind == "absolute":
        (model / name).symlink_to(secret)
    elif kind == "relative":
        (model / name).symlink_to("../secret.txt")
    elif kind == "chain":
        (model / "first").symlink_to("../secret.txt")
        (model / name).symlink_to("first")
    elif kind == "folder":
        (model / "up").symlink_to(model.parent)
        name = "up/secret.txt"
    else:
        (model / "sub").mkdir()
        (model / "sub" / "link").symlink_to("../../secret.txt")
        name = "sub/link"
    with pytest.raises(SourceError, match=r"is a link to .*secret\.txt, which lies outside"):
        inside(model, name)
    with pytest.raises(SourceError, match="which lies outside"):
        files_inside(model, name if "/" in name else "*")


def test_links_inside_the_folder_and_a_folder_that_is_itself_a_link(model: Path) -> None:
    (model / "alias.json").symlink_to("config.json")
    (model.parent / "named").symlink_to(model)
    assert (
        inside(model.parent / "named", "alias.json").read_text()
        == (model / "config.json").read_text()
    )


def test_a_folder_that_leads_out(model: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (model / "onnx").symlink_to(tmp_path / "private")
    with pytest.raises(SourceError, match="which lies outside"):
        folder_inside(model, "onnx")
    assert folder_inside(model, "nothing") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_what_is_no_regular_file(model: Path) -> None:
    os.mkfifo(model / "pipe.json")
    (model / "circle").symlink_to("circle")
    (model / "null").symlink_to("/dev/null")
    for name, said in (("pipe.json", "no regular file"), ("circle", "in a circle|Too many levels"),
                       ("null", "lies outside"), ("absent", "is missing")):  # fmt: skip
        with pytest.raises(SourceError, match=said):
            inside(model, name)


# huggingface_hub's cache ------------------------------------------------------------------------


def test_the_cache_of_the_hub_is_read(model: Path) -> None:
    snapshot = as_cache(model)
    assert all(path.is_symlink() for path in snapshot.iterdir())
    source = open_model(str(snapshot))
    assert source.tokenizer == snapshot
    next(iter(source.producers.values())).load()
    assert read_tokenizer(snapshot)("the")["input_ids"]


@pytest.mark.parametrize("trick", ["name", "blobs", "deeper", "sideways"])
def test_what_only_looks_like_the_cache_is_not(model: Path, secret: Path, trick: str) -> None:
    snapshot = as_cache(model, "folder" if trick == "name" else "models--owner--name")
    blobs = snapshot.parent.parent / "blobs"
    target = "config.json"
    if trick == "blobs":  # a link in the place of the folder of blobs
        shutil.move(blobs, blobs.with_name("elsewhere"))
        blobs.symlink_to("elsewhere")
    elif trick == "deeper":
        (blobs / "sub").mkdir()
        shutil.copy(secret, blobs / "sub" / "file")
        (snapshot / target).unlink()
        (snapshot / target).symlink_to("../../blobs/sub/file")
    elif trick == "sideways":
        other = snapshot.parent.parent.with_name("models--owner--private") / "blobs"
        other.mkdir(parents=True)
        shutil.copy(secret, other / "file")
        (snapshot / target).unlink()
        (snapshot / target).symlink_to(other / "file")
    with pytest.raises(SourceError, match="which lies outside the folder"):
        open_model(str(snapshot))


# Every file that is read ------------------------------------------------------------------------


def link_out(path: Path) -> Path:
    """Move a file out of its folder and leave a link to it, which works wherever it is followed."""
    outside = path.parent.parent / f"outside-{path.name}"
    shutil.move(path, outside)
    path.symlink_to(outside)
    return outside


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_of_a_checkpoint(model: Path, name: str) -> None:
    link_out(model / name)
    with pytest.raises(SourceError, match="which lies outside the folder"):
        open_model(str(model))


@pytest.mark.parametrize("way", ["link", "dots", "absolute"])
def test_shards_of_a_checkpoint(tmp_path: Path, way: str) -> None:
    model = save_tiny(tmp_path / "model", shard="20KB")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[1]
    outside = link_out(model / shard)
    if way != "link":
        (model / shard).unlink()
        other = f"../{outside.name}" if way == "dots" else str(outside)
        named = {key: other if value == shard else value
                 for key, value in index["weight_map"].items()}  # fmt: skip
        change(model, lambda data: data.update(weight_map=named), "model.safetensors.index.json")
    with pytest.raises(SourceError):
        open_model(str(model))


@pytest.mark.parametrize("name", ["program.json", "manifest.json", "model.safetensors", "model.py"])
def test_files_of_an_output(artifact: Path, name: str) -> None:
    link_out(artifact / name)
    with pytest.raises(SourceError):
        open_language_model(str(artifact), "torch")


@pytest.mark.parametrize("way", ["dots", "absolute", "link", "deep", "device"])
def test_storage_of_weights(artifact: Path, tmp_path: Path, way: str) -> None:
    """Bytes of any file would otherwise become weights, and leave with the next artifact."""
    outside = tmp_path / "private.bin"
    outside.write_bytes(bytes(2**20))
    names = {"dots": "../private.bin", "absolute": str(outside), "link": "link.bin",
             "deep": "x/../../private.bin", "device": "/dev/zero"}  # fmt: skip
    (artifact / "link.bin").symlink_to(outside)
    (artifact / "x").mkdir()

    def edit(data: dict[str, Any]) -> None:
        for place in data["storage"].values():
            place["file"] = names[way]
            place["offset"] = 0

    change(artifact, edit)
    with pytest.raises(SourceError):
        open_model(str(artifact))


@pytest.mark.parametrize("way", ["dots", "absolute", "link", "deep", "device", "missing"])
def test_files_that_the_index_of_an_output_names(tmp_path: Path, way: str) -> None:
    """`model.py` reads what the index names: tensors of any file would become weights."""
    outside = tmp_path / "private.safetensors"
    out = tmp_path / "out"
    go.emit(tiny_program(cache=True), out, emit=("torch", "onnx"))
    shutil.copy(out / "onnx" / "model.safetensors", outside)
    names = {"dots": "../private.safetensors", "absolute": str(outside), "link": "link",
             "deep": "x/../../private.safetensors", "device": "/dev/zero",
             "missing": "none.safetensors"}  # fmt: skip
    (out / "link").symlink_to(outside)
    (out / "x").mkdir()
    change(
        out,
        lambda data: data.update(weight_map=dict.fromkeys(data["weight_map"], names[way])),
        "model.safetensors.index.json",
    )
    with pytest.raises(SourceError):
        open_language_model(str(out), "torch")


# Tokenizers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt",
     "generation_config.json", "additional_chat_templates/tool.jinja", "special_tokens_map.json"],
)  # fmt: skip
def test_files_of_a_tokenizer(model: Path, secret: Path, tmp_path: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    program = tiny_program()
    program.tokenizer = str(model)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(SourceError, match="which lies outside the folder"):
        copy_tokenizer(program, out)
    with pytest.raises(SourceError, match="which lies outside the folder"):
        read_tokenizer(model)
    assert not any(SECRET in path.read_text() for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "key",
    ["vocab_file", "merges_file", "tokenizer_file", "spm_file", "fast_tokenizer_files",
     "init_inputs", "gguf_file", "chat_template_file", "added_tokens_file"],
)  # fmt: skip
def test_paths_in_a_tokenizers_configuration_are_not_followed(
    model: Path, tmp_path: Path, key: str
) -> None:
    """A vocabulary elsewhere has another token; whether it was read shows in the ids."""
    elsewhere = tmp_path / "elsewhere"
    other = byte_tokenizer()
    other.add_tokens([SECRET])
    other.save_pretrained(elsewhere)
    path = str(elsewhere / "tokenizer.json")
    value: Any = [path] if key.endswith("s") else path
    change(model, lambda data: data.update({key: value}), "tokenizer_config.json")
    ids = read_tokenizer(model)(SECRET)["input_ids"]
    assert ids == byte_tokenizer()(SECRET)["input_ids"] and len(ids) > 1


@pytest.mark.parametrize("place", ["vocab", "added_tokens", "added_tokens_decoder", "vocab.json"])
def test_ids_beyond_all_vocabularies(model: Path, place: str) -> None:
    """The tokenizers library would take gigabytes for the numbers between."""
    number = 2**31
    if place == "vocab.json":
        (model / place).write_text(json.dumps({"far": number}))
    elif place == "added_tokens_decoder":
        change(model, lambda data: data.update({place: {str(number): {"content": "far"}}}),
               "tokenizer_config.json")  # fmt: skip
    else:
        entry = {"id": number, "content": "far", "special": False}
        change(
            model,
            lambda data: (
                data["model"]["vocab"].update(far=number)
                if place == "vocab"
                else data["added_tokens"].append(entry)
            ),
            "tokenizer.json",
        )
    with pytest.raises(SourceError, match="gives the token 'far' the id 2147483648, and ids go"):
        read_tokenizer(model)


def test_the_tokenizer_of_an_output_lies_in_it(artifact: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    byte_tokenizer().save_pretrained(elsewhere)
    for path in artifact.glob("tokenizer*"):
        path.unlink()
    (artifact / "hf").symlink_to(elsewhere)
    with pytest.raises(SourceError, match="which lies outside the folder"):
        open_model(str(artifact))


@pytest.mark.slow
def test_whole_compile_copies_nothing_from_outside(
    model: Path, secret: Path, tmp_path: Path
) -> None:
    (model / "notes.txt").symlink_to(secret)
    with pytest.raises(GraphoptError, match="which lies outside the folder"):
        go.compile_model(
            str(model), tmp_path / "out", go.CompileOptions(emit=("torch",), verify=False)
        )
    assert not (tmp_path / "out").exists()


# ONNX -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("onnx")
    go.emit(tiny_program(layers=1, cache=True), root / "out", emit=("onnx",))
    return root / "out"


@pytest.mark.parametrize("where", ["weight", "attribute", "inner graph", "function"])
@pytest.mark.parametrize(
    "way", ["../private.bin", "/etc/passwd", "link.bin", "x/../../private.bin"]
)
def test_external_data_of_onnx(graph: Path, tmp_path: Path, where: str, way: str) -> None:
    folder = Path(shutil.copytree(graph / "onnx", tmp_path / "onnx"))
    (tmp_path / "private.bin").write_bytes(bytes(2**20))
    (folder / "link.bin").symlink_to(tmp_path / "private.bin")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = onnx.TensorProto(name="evil", data_type=onnx.TensorProto.FLOAT, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", way), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    node = onnx.helper.make_node("Constant", [], ["evil"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    if where == "weight":
        model.graph.initializer.append(tensor)
    elif where == "attribute":
        model.graph.node.insert(0, node)
    elif where == "inner graph":
        body = onnx.GraphProto(name="body", initializer=[tensor])
        model.graph.node.append(onnx.helper.make_node("If", ["c"], ["d"], then_branch=body))
    else:
        model.functions.add(name="f", domain="evil").node.append(node)
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(SourceError, match=r"not one below it|which lies outside"):
        OnnxArtifactModel(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_onnx_files_that_are_links(graph: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(graph / "onnx", tmp_path / "onnx"))
    link_out(folder / name)
    with pytest.raises(SourceError, match="which lies outside"):
        OnnxArtifactModel(folder)


def test_a_genuine_output_is_read(artifact: Path, graph: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    model = open_language_model(str(artifact), "torch")
    program = open_language_model(str(artifact), "program")
    assert torch.allclose(model.logits(ids), program.logits(ids), atol=1e-4)
    assert load_tokenizer(model)("the")["input_ids"]
    assert open_language_model(str(graph)).logits(ids).shape == (1, 3, 97)
