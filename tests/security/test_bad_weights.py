"""Weights of an output folder that are not numbers, in every form that runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import tiny_program
from sampling import slow_but

import graphopt as go
from graphopt.backends.opening import open_language_model
from graphopt.errors import SourceError
from graphopt.execute.language_model import LanguageModel
from graphopt.files.raw import RawTensor
from graphopt.ir.graph import Program
from graphopt.ir.weights import Weight
from graphopt.storage.artifact import load_program


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("both") / "out"
    go.emit(tiny_program(layers=2, cache=True, bias=True), root, emit=("torch", "onnx"))
    return root


def poison(root: Path, name: str, value: float, form: str) -> None:
    """Overwrite one element of a weight in the files that a form reads."""
    data = torch.tensor([value]).numpy().tobytes()
    if form == "onnx":
        import onnx

        path = root / "onnx" / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        if not tensor.external_data:
            tensor.raw_data = data + tensor.raw_data[4:]
            onnx.save(model, path)
            return
        entries = {entry.key: entry.value for entry in tensor.external_data}
        place, offset = root / "onnx" / entries["location"], int(entries["offset"])
    else:
        producer = load_program(root).weights[name].producer
        assert isinstance(producer, RawTensor)
        place, offset = producer.path, producer.offset
    with place.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# A matrix, and a vector that the ONNX form keeps inside its model file.
NAMES = ("layers.1.mlp.up_proj.weight", "layers.0.input_layernorm.weight")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["torch", "onnx", "program"])
def test_such_a_weight_is_named(
    both: Path, tmp_path: Path, form: Any, name: str, value: float
) -> None:
    root = Path(shutil.copytree(both, tmp_path / "out"))
    poison(root, name, value, form)
    with pytest.raises(SourceError, match=f"Weight '{name}' holds . NaN and . Inf"):
        model: LanguageModel = open_language_model(str(root), form)
        model.logits(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("emit", ["torch", "onnx"])
@pytest.mark.parametrize("verify", [True, False])
def test_nothing_is_compiled_from_it(both: Path, tmp_path: Path, emit: str, verify: bool) -> None:
    root = Path(shutil.copytree(both, tmp_path / "out"))
    poison(root, NAMES[0], math.nan, "torch")
    with pytest.raises(SourceError, match=f"Weight '{NAMES[0]}' holds 1 NaN and 0 Inf"):
        go.compile_model(
            str(root), tmp_path / "again", go.CompileOptions(emit=(emit,), verify=verify)
        )
    assert not (tmp_path / "again").exists()


def with_constant(value: float) -> Program:
    """A program with a constant of one element that is added to its logits."""
    from graphopt.ir import Array, Value

    program = tiny_program(layers=1, cache=True)
    call = program.calls[-1]
    function = program.functions[call.function]
    program.weights.add(Weight("offset", Array(torch.full((97,), value)), constant=True))
    slot = Value("offset")
    function.weights["offset"], call.weights["offset"] = slot, "offset"
    function.results[0] = function.add("add", [function.results[0], slot]).output
    return program


@pytest.mark.parametrize("form", ["torch", "onnx", "program"])
def test_constants_may_be_infinite_and_not_nan(tmp_path: Path, form: Any) -> None:
    go.emit(with_constant(-math.inf), tmp_path / "out", emit=("torch", "onnx"))
    model = open_language_model(str(tmp_path / "out"), form)
    assert bool(model.logits(torch.tensor([[1]])).isinf().all())
    poison(tmp_path / "out", "offset", math.nan, form)
    with pytest.raises(SourceError, match="Weight 'offset' holds 1 NaN"):
        open_language_model(str(tmp_path / "out"), form).logits(torch.tensor([[1]]))


def _header(path: Path, change: Any) -> None:
    """Change the header of a safetensors file; every tensor stays where it is."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(data[:8] + text + data[8 + length :])


def _exchange(header: Any) -> None:
    a, b = "layers.0.mlp.up_proj.weight", "layers.0.self_attn.q_proj.weight"
    header[a], header[b] = header[b], header[a]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_exchange, r"holds weight 'layers\.\d\..*' as \[.*\] in f32, and the program has it as"),
        (lambda h: h[NAMES[0]]["shape"].reverse(), rf"'{NAMES[0]}' as"),
        (lambda h: h[NAMES[0]].update(shape=[1, *h[NAMES[0]]["shape"]]), r"as \[1, "),
        (lambda h: h[NAMES[0]].update(dtype="I32"), r"in i32"),
        (lambda h: h.update({"x": h.pop(NAMES[0])}), rf"lacks the weight '{NAMES[0]}'"),
    ],
)
@pytest.mark.parametrize(
    "emit", slow_but([("torch",), ("torch", "onnx"), ("onnx", "torch")], ("torch",))
)
def test_weights_of_other_shapes_and_types(
    tmp_path: Path, emit: tuple[str, ...], change: Any, message: str
) -> None:
    root = tmp_path / "out"
    go.emit(tiny_program(layers=2, cache=True, bias=True), root, emit=emit)
    shared = len(emit) > 1
    _header(root / ("onnx/model.safetensors" if shared else "model.safetensors"), change)
    # Where program.json, or the index, places weights in that file, it says so of itself.
    places = "model.safetensors has no f32 tensor|which does not hold it"
    with pytest.raises(SourceError, match=f"{message}|{places}"):
        open_language_model(str(root), "torch")
