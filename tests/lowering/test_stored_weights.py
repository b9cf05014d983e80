"""In which dtype and how often weights are stored: as asked for, and once where forms agree."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from emitted import load_file
from onnx_models import run, run_in_steps, session
from programs import tiny_program
from safetensors.torch import load_file as load_safetensors
from sampling import slow_but
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import graphopt as go
from graphopt.capture import capture
from graphopt.errors import GraphoptError, SourceError, UsageError
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.files.safetensors import read_header
from graphopt.ir import Array, Program, Weight
from graphopt.ir.dtypes import STORED_DTYPES, with_weights_in
from graphopt.ir.weights import Cast
from graphopt.lowering.onnx import OnnxEmitter
from graphopt.storage import output_folder
from graphopt.storage.artifact import check_weights_file, load_program
from graphopt.support.progress import silent

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def inputs(rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))
    return complete_inputs({"input_ids": ids})


def exact(program: Program, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return Runner(program, dtype=torch.float64, mode="reference").logits(feeds)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


SINGLE = 1e-5
"""Some hundred roundings to fp32, most of them averaged out: the weights are the same."""


@pytest.mark.parametrize("stored", sorted(STORED_DTYPES))
@pytest.mark.parametrize("emit", [("onnx",), ("torch",), ("onnx", "torch")])
def test_every_form_computes_with_the_rounded_weights(
    stored: str, emit: tuple[str, ...], tmp_path: Path
) -> None:
    """Against the rounded program in fp64: forms round weights alike, and nothing else."""
    program = tiny_program(cache=True, bias=True)
    report = go.emit(program, tmp_path / "out", emit=emit, dtype=stored)
    feeds, expected = inputs(), exact(with_weights_in(program, STORED_DTYPES[stored]), inputs())
    names = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    assert {form.dtype for form in report.artifact.forms} == {names[stored]}
    if "onnx" in emit:
        for name in ("model.onnx", "genai.onnx"):
            path = tmp_path / "out" / "onnx" / name
            if path.exists():
                assert error(run(session(path), feeds)[0], expected) < SINGLE
        model = session(tmp_path / "out" / "onnx" / "model.onnx")
        assert error(run_in_steps(model, feeds, [4, 5, 9]), expected) < SINGLE
    if "torch" in emit:
        model = load_file(tmp_path / "out" / "model.py").load()
        with torch.no_grad():
            assert error(model(feeds["input_ids"])[0], expected) < SINGLE
    again = capture(str(tmp_path / "out"))
    assert again.checkpoint_dtype == STORED_DTYPES[stored]
    assert error(Runner(again).logits(feeds), expected) < SINGLE


@pytest.mark.slow
@pytest.mark.parametrize("stored", sorted(HALF))
def test_onnxruntime_genai_runs_a_folder_of_16_bits(stored: str, tmp_path: Path) -> None:
    """Half the size, logits within 2e-2 of those in fp32, and the tokens of the rounded weights."""
    og = pytest.importorskip("onnxruntime_genai")
    program = capture(str(save_tiny(tmp_path / "m", hidden_size=64, intermediate_size=96)))
    program, _ = go.Pipeline.default().run(program, go.RunOptions(verify=False))
    folders = {dtype: tmp_path / dtype for dtype in ("float32", stored)}
    for dtype, folder in folders.items():
        go.emit(program, folder, emit=("onnx",), dtype=dtype)
    feeds = inputs()
    single, half = (
        run(session(folder / "onnx/model.onnx"), feeds)[0] for folder in folders.values()
    )
    assert float((half - single).abs().max()) < 2e-2 * float(single.abs().max())
    sizes = [(folder / "onnx/model.onnx.data").stat().st_size for folder in folders.values()]
    # Tensors begin on a page, of which a tiny model's fill few.
    assert sizes[1] < 0.75 * sizes[0]
    graph = onnx.load(folders[stored] / "onnx/genai.onnx", load_external_data=False).graph
    held = {
        onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer if t.external_data
    }
    assert held == {stored.upper()}

    ids = feeds["input_ids"][0].tolist()
    model = og.Model(str(folders[stored] / "onnx"))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=len(ids) + 8, min_length=len(ids) + 8, do_sample=False)
    generator = og.Generator(model, options)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    runner = Runner(with_weights_in(program, HALF[stored]))
    for _ in range(8):
        logits = runner.logits(complete_inputs({"input_ids": torch.tensor([ids])}))
        ids.append(int(logits[0, -1].argmax()))
    assert [int(token) for token in generator.get_sequence(0)] == ids


@pytest.mark.parametrize("stored", sorted(STORED_DTYPES))
def test_two_forms_read_one_file(stored: str, tmp_path: Path) -> None:
    program = tiny_program(cache=True, tied=False)
    out = tmp_path / "out"
    report = go.emit(program, out, emit=("torch", "onnx"), dtype=stored)
    names = [weight.name for weight in program.weights if weight.numel >= 256]
    assert set(names) <= set(load_safetensors(out / "onnx" / "model.safetensors"))
    own = load_safetensors(out / "model.safetensors")
    assert not set(own) & set(names)  # constants, and what ONNX has in the model file
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {weight.name for weight in program.weights}
    assert {index[name] for name in names} == {"onnx/model.safetensors"}
    one = sum(weight.numel for weight in program.weights) * STORED_DTYPES[stored].itemsize
    files = [path for path in out.rglob("*.safetensors*") if path.suffix != ".json"]
    # A header has its room beforehand, and a page is 4,096 bytes.
    assert sum(path.stat().st_size for path in files) < one + 2 * 4096 + 400 * len(names)
    torch_form, onnx_form = report.artifact.forms
    assert (torch_form.name, onnx_form.name) == ("torch", "onnx")
    assert torch_form.shared_files == ["onnx/model.safetensors"] and not onnx_form.shared_bytes
    assert torch_form.shared_bytes == STORED_DTYPES[stored].itemsize * sum(
        program.weights[name].numel for name in names
    )
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in files)
    onnx.checker.check_model(str(out / "onnx" / "model.onnx"))
    onnx.load(out / "onnx" / "model.onnx")  # which refuses data files that are links
    check_weights_file(out, load_program(out))


def test_a_graph_reads_the_shared_file_where_weights_lie(tmp_path: Path) -> None:
    """Aligned, and queries, keys and values one behind the other as one matrix."""
    program = tiny_program(cache=True)
    folder = tmp_path / "onnx"
    emitted = OnnxEmitter(shared=True).emit(program, tmp_path, "cpu", silent)
    held = read_header(folder / "model.safetensors")
    for name, place in emitted.storage.items():
        assert (place.offset, place.shape) == (held[name].offset, program.weights[name].shape)
        assert torch.equal(held[name].load(), program.weights[name].load())
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.external_data
    }
    assert {place["location"] for place in places.values()} == {"model.safetensors"}
    assert all(int(place["offset"]) % 64 == 0 for place in places.values())
    packed = next(name for name in places if name.endswith(".and_2_more"))
    q, k, v = (held[f"layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
    assert int(places[packed]["offset"]) == q.offset
    assert (k.offset, v.offset) == (q.offset + q.nbytes, k.offset + k.nbytes)
    assert int(places[packed]["length"]) == q.nbytes + k.nbytes + v.nbytes


def test_padding_keeps_a_shared_file_whole(tmp_path: Path) -> None:
    """Elements of two bytes leave gaps of odd sizes: the format has none, so they are tensors."""
    program = tiny_program(cache=True, hidden=20, heads=2, head_dim=10, ffn=33, vocab=31)
    rounded = with_weights_in(program, torch.bfloat16)
    emitted = OnnxEmitter(shared=True).emit(rounded, tmp_path, "cpu", silent)
    values = load_safetensors(tmp_path / "onnx" / "model.safetensors")
    assert any(name.startswith("padding.") for name in values)
    for name in emitted.storage:
        assert torch.equal(values[name], rounded.weights[name].load())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_tiny(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("order", ["hf torch onnx", "onnx torch hf"])
@pytest.mark.parametrize("stored", [None, "bfloat16"])
def test_a_checkpoint_and_the_torch_form_share_it(
    checkpoint: Path, stored: str | None, order: str, tmp_path: Path
) -> None:
    program = go.Pipeline.default().run(capture(str(checkpoint)), go.RunOptions(verify=False))[0]
    out = tmp_path / "out"
    report = go.emit(program, out, emit=order.split(), dtype=stored or "auto")
    forms = {form.name: form for form in report.artifact.forms}
    assert forms["torch"].shared_files == ["hf/model.safetensors"]
    assert forms["torch"].shared_bytes > 0.9 * sum(
        weight.numel * (2 if stored else 4) for weight in program.used_weights()
    )
    dtype = HALF[stored] if stored else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(out / "hf")
    assert loaded.dtype == dtype
    feeds = inputs(1)
    expected = exact(with_weights_in(program, dtype), feeds)
    with torch.no_grad():
        assert error(loaded.float()(feeds["input_ids"]).logits, expected) < SINGLE
        model = load_file(out / "model.py").load()
        assert error(model(feeds["input_ids"])[0], expected) < SINGLE
    assert error(run(session(out / "onnx" / "model.onnx"), feeds)[0], expected) < SINGLE


@pytest.mark.slow
def test_a_source_of_16_bits_stays_so_in_every_form(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_tiny(folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    program = go.Pipeline.default().run(capture(str(folder)), go.RunOptions(verify=False))[0]
    report = go.emit(program, tmp_path / "out", emit=("onnx", "torch"))
    assert {form.dtype for form in report.artifact.forms} == {"bf16"}
    feeds = inputs(1)
    logits = run(session(tmp_path / "out" / "onnx" / "model.onnx"), feeds)[0]
    assert error(logits, exact(program, feeds)) < SINGLE


@pytest.mark.slow
def test_packages_for_a_gpu_store_what_they_compute_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.lowering.torch.lowered_kernels import LoweredKernels

    monkeypatch.setattr(LoweredKernels, "compile", lambda self: {})
    program = tiny_program(cache=True, head_dim=64)
    constants = {weight.name for weight in program.weights if weight.constant}
    for stored, dtype in (("auto", torch.float16), ("bfloat16", torch.bfloat16),
                          ("float32", torch.float32)):  # fmt: skip
        out = tmp_path / stored
        go.emit(program, out, target="hopper", emit=("torch",), dtype=stored)
        values = load_safetensors(out / "model.safetensors")
        assert {value.dtype for name, value in values.items() if name not in constants} == {dtype}
        assert all(values[name].dtype == program.weights[name].dtype for name in constants)
        # What is computed in is in model.py, which is compared with what program.json makes.
        go_again = capture(str(out))
        assert go_again.checkpoint_dtype == dtype


def test_the_folder_is_opened_with_the_most_exact_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.lowering.torch.lowered_kernels import LoweredKernels

    monkeypatch.setattr(LoweredKernels, "compile", lambda self: {})
    program = go.Pipeline.default().run(capture(str(checkpoint)), go.RunOptions(verify=False))[0]
    go.emit(program, tmp_path / "out", target="hopper", emit=("torch", "hf"))
    assert load_program(tmp_path / "out").checkpoint_dtype == torch.float32


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    program = tiny_program(cache=True)
    weight = program.weights["layers.0.mlp.down_proj.weight"]
    value = weight.load().clone()
    value[0, 0] = 7e4
    program.weights.replace(weight.with_producer(Array(value)))
    with pytest.raises(SourceError, match="holds 70000, and f16 ends at 65504") as caught:
        go.emit(program, tmp_path / "out", emit=("onnx",), dtype="float16")
    assert "bfloat16" in caught.value.remedy and not (tmp_path / "out").exists()
    go.emit(program, tmp_path / "out", emit=("onnx",), dtype="bfloat16")


def test_rounding_reads_nothing_and_keeps_ties_and_constants() -> None:
    class Unread(Array):
        def load(self) -> torch.Tensor:
            pytest.fail("a weight was read")

    program = tiny_program()
    for weight in list(program.weights):
        program.weights.replace(weight.with_producer(Unread(weight.load())))
    shared = program.weights["norm.weight"].producer
    program.weights.add(Weight("twin", shared))
    rounded = with_weights_in(program, torch.float16)
    assert rounded.weights["twin"].producer is rounded.weights["norm.weight"].producer
    for weight in program.weights:
        kind = weight.dtype if weight.constant else torch.float16
        assert rounded.weights[weight.name].dtype == kind
    assert program.checkpoint_dtype == torch.float32  # and the one that was given is as it was
    assert with_weights_in(rounded, torch.float16).weights["twin"] is rounded.weights["twin"]


def test_rows_of_a_cast_are_those_of_the_whole() -> None:
    value = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    cast = Cast(Array(value), torch.bfloat16, "w")
    assert torch.equal(cast.load_rows(2, 6), cast.load()[2:6])
    assert torch.equal(cast.load(), value.bfloat16())


def test_another_dtype_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bfloat61"):
        go.emit(tiny_program(), tmp_path / "out", dtype="bfloat61")


# The room that it takes -------------------------------------------------------------------------


@pytest.mark.parametrize("stored", slow_but(["float32", "bfloat16"], "bfloat16"))
@pytest.mark.parametrize(
    "emit",
    slow_but([("onnx",), ("torch", "onnx"), ("hf", "torch"), ("hf", "onnx")], ("torch", "onnx")),
)
def test_what_is_said_beforehand_is_what_is_written(
    checkpoint: Path, stored: str, emit: tuple[str, ...], tmp_path: Path
) -> None:
    """But for headers, tokenizers and the small tensors that ONNX has in the model file."""
    planned: list[Any] = []
    options = go.CompileOptions(emit=emit, dtype=stored, verify=False)
    report = go.compile_model(str(checkpoint), tmp_path / "out", options, on_write=planned.extend)
    expected = {form.name: form for form in planned}
    assert set(expected) == set(emit)
    written = [path for path in (tmp_path / "out").rglob("*")
               if path.suffix in (".safetensors", ".data")]  # fmt: skip
    total = sum(form.bytes for form in planned)
    room = 4096 * 40 if "onnx" in emit else 4096 * len(emit)  # tensors of the graph start on pages
    assert total - 4096 < sum(path.stat().st_size for path in written) < total + room
    for form in report.artifact.forms:
        assert form.dtype == expected[form.name].dtype
        assert abs(form.shared_bytes - expected[form.name].shared_bytes) < 4096


def test_a_disk_without_room_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage(10**9, 0, 10**4))
    monkeypatch.setattr(Weight, "load", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(GraphoptError, match=r"No space left .* about 7\d\.\d kB, .* has 10\.0 kB"):
        go.emit(tiny_program(cache=True), tmp_path / "new" / "out", emit=("torch",))
    assert not (tmp_path / "new").exists()
