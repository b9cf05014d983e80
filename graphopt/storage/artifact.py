"""Output folders as models: program.json, and where every weight's bytes lie."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch

from graphopt.errors import SourceError
from graphopt.files.confined import inside
from graphopt.files.raw import RawTensor
from graphopt.files.safetensors import SafetensorsWriter, read_header
from graphopt.ir.graph import Program
from graphopt.ir.schema import Dtype, Shape
from graphopt.ir.serialize import program_from_json, program_to_json
from graphopt.ir.types import DTYPE_NAMES, DTYPES
from graphopt.ir.weight_store import WeightStore
from graphopt.ir.weights import Producer, Reshaped, Rows, Transposed
from graphopt.storage.shared_weights import torch_weights
from graphopt.storage.stored_weight import StoredWeight
from graphopt.support.inputs import OpenSchema, Schema, Size, parse, read_json
from graphopt.support.plain import shown

PROGRAM_NAME = "program.json"
_AGAIN = "Compile the model again."
WEIGHTS_NAME = "model.safetensors"
VISION_NAME = "vision.safetensors"


class _Place(Schema):
    """What is saved of a `StoredWeight`."""

    file: Annotated[str, pydantic.Field(min_length=1, max_length=1000)]
    offset: Size
    shape: Shape
    dtype: Dtype
    transposed: bool
    rows: Annotated[list[Size], pydantic.Field(min_length=2, max_length=3)] | None

    @pydantic.model_validator(mode="after")
    def _is_whole(self) -> _Place:
        if self.transposed and len(self.shape) not in (2, 3):
            raise ValueError("what is transposed should have two or three dimensions")
        if self.rows is not None and len(self.rows) == 3 and self.rows[2] == 0:
            raise ValueError("the step of rows should be at least 1")
        return self


class _Storage(OpenSchema):
    """Where weights are, by name; each is parsed for itself."""

    storage: dict[str, Any]


def save_program(program: Program, root: Path, storage: dict[str, StoredWeight]) -> None:
    """Write `program.json`, and the weights that no emitter stored to `model.safetensors`.

    What a model that sees has beside its decoder goes to `vision.safetensors`.

    Args:
        program: Weights are read one at a time.
        root: The output folder.
        storage: Where emitters have put weights already, by the names of `Weight.tensors`.

    Raises:
        SourceError: A weight cannot be read or is not finite.
        GraphoptError: The disk is full.
    """
    places = dict(storage)
    _save_rest(program.weights, root, WEIGHTS_NAME, places)
    if program.vision is not None:
        _save_rest(program.vision.carried, root, VISION_NAME, places)
    data = program_to_json(program)
    data["storage"] = {name: _pack(places[name]) for name in sorted(places)}
    elements: Counter[str] = Counter()
    for weight in data["weights"]:
        # The saved form is what is stored: an emitter may have written another dtype.
        stored = f"{weight['name']}.scales" if weight["encoding"] else weight["name"]
        weight["dtype"] = DTYPE_NAMES[places[stored].dtype]
        if not weight["constant"] and places[stored].dtype.is_floating_point:
            elements[weight["dtype"]] += math.prod(weight["shape"])
    if elements:
        data["checkpoint_dtype"] = elements.most_common(1)[0][0]
    text = json.dumps(data, indent=1, ensure_ascii=False)
    (root / PROGRAM_NAME).write_text(text + "\n", encoding="utf-8")


def _save_rest(
    weights: WeightStore, root: Path, name: str, places: dict[str, StoredWeight]
) -> None:
    """Write the weights that have no place yet to a file, and put their places down."""
    left = [tensor for tensor in weights.tensors() if tensor.name not in places]
    if not left:
        return
    kinds = {weight.name: (weight.shape, weight.dtype) for weight in left}
    with SafetensorsWriter(root / name, kinds) as writer:
        for weight in left:
            if weight.constant:
                # A constant may hold infinity on purpose; trained weights may not.
                writer.write(weight.name, weight.load().contiguous())
            else:
                writer.copy(weight.name, weight.producer)
            raw = writer.tensors[weight.name]
            places[weight.name] = StoredWeight(name, raw.offset, weight.shape, weight.dtype)


def load_program(root: Path) -> Program:
    """Return the program of an output folder; its weights are read when they are asked for.

    Raises:
        SourceError: `program.json` is malformed, or a file is missing, too short, or holds a
            weight of another shape than the program's or elsewhere, or a weight is stored nowhere.
    """
    path = root / PROGRAM_NAME
    data = read_json(inside(root, PROGRAM_NAME), remedy=_AGAIN)
    storage = parse(_Storage, data, str(path), remedy=_AGAIN).storage
    producers: dict[str, Producer] = {}
    headers: dict[str, dict[int, list[RawTensor]]] = {}
    for name, item in storage.items():
        where = f"{path}: the place of weight {shown(name)}"
        place = parse(_Place, item, where, remedy=_AGAIN)
        producers[name] = _producer(root, name, place)
        if place.file.endswith(".safetensors"):
            if place.file not in headers:
                headers[place.file] = {}
                for raw in read_header(inside(root, place.file)).values():
                    headers[place.file].setdefault(raw.offset, []).append(raw)
            there = headers[place.file].get(place.offset, [])
            if not any(_holds(raw, place) for raw in there):
                # `model.py` reads tensors by name: they must be those that were written.
                raise SourceError(
                    f"{root / place.file} has no {place.dtype} tensor {place.shape} at byte "
                    f"{place.offset}, where weight {shown(name)} should be.",
                    _AGAIN,
                )
    program = program_from_json({k: v for k, v in data.items() if k != "storage"}, producers)
    for tensor in program.stored_tensors():
        if tensor.name not in producers:
            raise SourceError(
                f"{path} does not say where weight {shown(tensor.name)} is stored.", _AGAIN
            )
    return program


def _holds(raw: RawTensor, place: _Place) -> bool:
    """Return whether a tensor of a file is what a place says of it.

    A checkpoint has the bytes of codes as words.
    """
    dtype = DTYPES[place.dtype]
    if dtype == torch.uint8 and raw.dtype == torch.int32:
        return math.prod(place.shape) == raw.nbytes
    return (tuple(place.shape), dtype) == (raw.shape, raw.dtype)


def check_weights_file(root: Path, program: Program) -> None:
    """Refuse weights that are not those of a program, by the headers of the files that hold them.

    `program.json` may say that weights lie in the files of another form, so what it says of places
    does not hold this file to anything; `model.py` takes from it, by name, whatever is there.

    Args:
        root: The output folder.
        program: The program saved in it.

    Raises:
        SourceError: The file is missing, damaged or a link out of the folder, or lacks a weight, or
            has it in another shape, or integers in the place of floats.
    """
    if not len(program.weights):
        return
    path = root / WEIGHTS_NAME
    try:
        held = torch_weights(root)
    except SourceError as error:  # which was made here, and not downloaded
        raise SourceError(error.message, _AGAIN) from error
    for weight in program.weights.tensors():
        raw = held.get(weight.name)
        if raw is None:
            raise SourceError(f"{path} lacks the weight {shown(weight.name)}.", _AGAIN)
        path = raw.path
        # Forms may be stored in different precisions.
        same = raw.dtype == weight.dtype or (
            raw.dtype.is_floating_point and weight.dtype.is_floating_point
        )
        if raw.shape != weight.shape or not same:
            kinds = [
                f"{list(item.shape)} in {DTYPE_NAMES.get(item.dtype, item.dtype)}"
                for item in (raw, weight)
            ]
            raise SourceError(
                f"{path} holds weight {shown(weight.name)} as {kinds[0]}, and the program has it "
                f"as {kinds[1]}.",
                _AGAIN,
            )


def _producer(root: Path, name: str, place: _Place) -> Producer:
    path = root / place.file
    if path.exists() or path.is_symlink():
        path = inside(root, place.file)
    end = place.offset + math.prod(place.shape) * DTYPES[place.dtype].itemsize
    if not path.is_file() or path.stat().st_size < end:
        what = "is truncated" if path.is_file() else "is missing"
        raise SourceError(f"{path} {what}: weight {shown(name)} should be in it.", _AGAIN)
    raw = RawTensor(path, place.offset, tuple(place.shape), DTYPES[place.dtype])
    whole: Producer = raw
    if place.transposed:
        whole = Transposed(raw)
        if len(place.shape) == 3:
            parts, out, columns = place.shape
            whole = Reshaped(whole, (out, parts * columns))
    if place.rows is None:
        return whole
    first, stop, *_ = place.rows
    if not whole.shape or not first < stop <= whole.shape[0]:
        raise SourceError(
            f"{root / PROGRAM_NAME}: weight {shown(name)} should be rows {first} to {stop} of "
            f"{list(whole.shape)}.",
            _AGAIN,
        )
    return Rows(whole, slice(*place.rows))


def _pack(place: StoredWeight) -> dict[str, Any]:
    return {
        "file": place.file,
        "offset": place.offset,
        "shape": list(place.shape),
        "dtype": DTYPE_NAMES[place.dtype],
        "transposed": place.transposed,
        "rows": place.rows,
    }


class _Manifest(OpenSchema):
    """What is read of a manifest."""

    target: str


def artifact_target(root: Path) -> str:
    """Return the target an output folder was emitted for; `cpu` where it does not say.

    Raises:
        SourceError: Its manifest cannot be read.
    """
    path = root / "manifest.json"
    if not path.exists():
        return "cpu"
    data = read_json(inside(root, path.name), remedy=_AGAIN)
    return parse(_Manifest, data, str(path), remedy=_AGAIN).target
