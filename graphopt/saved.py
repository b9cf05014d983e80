"""Output folders as models: program.json, and where every weight's bytes lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import SourceError
from graphopt.inputs import OpenSchema, parse, read_json
from graphopt.ir.graph import Program
from graphopt.ir.serialize import program_from_json, program_to_json
from graphopt.ir.types import DTYPE_NAMES, DTYPES
from graphopt.ir.weights import Producer, Reshaped, Rows, Transposed
from graphopt.lowering.base import StoredWeight
from graphopt.sources.confined import inside
from graphopt.sources.raw import RawTensor
from graphopt.sources.safetensors import SafetensorsWriter

PROGRAM_NAME = "program.json"
WEIGHTS_NAME = "model.safetensors"


def save_program(program: Program, root: Path, storage: dict[str, StoredWeight]) -> None:
    """Write `program.json`, and the weights that no emitter stored to `model.safetensors`.

    Args:
        program: Weights are read one at a time.
        root: The output folder.
        storage: Where emitters have put weights already, by program weight name.

    Raises:
        SourceError: A weight cannot be read or is not finite.
        GraphoptError: The disk is full.
    """
    places = dict(storage)
    left = [weight for weight in program.weights if weight.name not in places]
    if left:
        path = root / WEIGHTS_NAME
        kinds = {weight.name: (weight.shape, weight.dtype) for weight in left}
        with SafetensorsWriter(path, kinds) as writer:
            for weight in left:
                if weight.constant:
                    # A constant may hold infinity on purpose; trained weights may not.
                    writer.write(weight.name, weight.load().contiguous())
                else:
                    writer.copy(weight.name, weight.producer)
                raw = writer.tensors[weight.name]
                places[weight.name] = StoredWeight(
                    WEIGHTS_NAME, raw.offset, weight.shape, weight.dtype
                )
    data = program_to_json(program)
    data["storage"] = {name: _pack(places[name]) for name in sorted(places)}
    for weight in data["weights"]:
        # The saved form is what is stored: an emitter may have written another dtype.
        weight["dtype"] = DTYPE_NAMES[places[weight["name"]].dtype]
    text = json.dumps(data, indent=1, ensure_ascii=False)
    (root / PROGRAM_NAME).write_text(text + "\n", encoding="utf-8")


def load_program(root: Path) -> Program:
    """Return the program of an output folder; its weights are read when they are asked for.

    Raises:
        SourceError: `program.json` is malformed, or a file is missing, too short, or holds a
            weight of another shape than the program's, or a weight is stored nowhere.
    """
    path = root / PROGRAM_NAME
    data = read_json(inside(root, PROGRAM_NAME), remedy="Compile the model again.")
    try:
        stored = {name: _unpack(item) for name, item in data["storage"].items()}
        shapes = {item["name"]: tuple(item["shape"]) for item in data["weights"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{path} is not a saved graphopt program: {error}.", "Compile the model again."
        ) from error
    lost = sorted(set(shapes) - set(stored))
    if lost:
        raise SourceError(
            f"{path} does not say where weight {lost[0]!r} is stored.", "Compile the model again."
        )
    producers: dict[str, Producer] = {}
    for name, place in stored.items():
        producers[name] = _producer(root, name, place)
        if name in shapes and tuple(producers[name].shape) != shapes[name]:
            raise SourceError(
                f"{path}: weight {name!r} is stored as {list(producers[name].shape)}, the program "
                f"has it as {list(shapes[name])}.",
                "Compile the model again.",
            )
    return program_from_json(data, producers)


def _producer(root: Path, name: str, place: StoredWeight) -> Producer:
    path = root / place.file
    if path.exists():
        path = inside(root, place.file)
    count = place.dtype.itemsize
    for size in place.shape:
        count *= size
    if not path.is_file() or path.stat().st_size < place.offset + count:
        what = "is truncated" if path.is_file() else "is missing"
        raise SourceError(
            f"{path} {what}: weight {name!r} should be in it.", "Compile the model again."
        )
    raw = RawTensor(path, place.offset, place.shape, place.dtype)
    whole: Producer = Transposed(raw) if place.transposed else raw
    if place.transposed and len(place.shape) == 3:
        parts, out, columns = place.shape
        whole = Reshaped(whole, (out, parts * columns))
    return whole if place.rows is None else Rows(whole, slice(*place.rows))


def _pack(place: StoredWeight) -> dict[str, Any]:
    return {
        "file": place.file,
        "offset": place.offset,
        "shape": list(place.shape),
        "dtype": DTYPE_NAMES[place.dtype],
        "transposed": place.transposed,
        "rows": place.rows,
    }


def _unpack(item: dict[str, Any]) -> StoredWeight:
    dtype: torch.dtype = DTYPES[item["dtype"]]
    shape = tuple(int(size) for size in item["shape"])
    rows = item.get("rows")
    return StoredWeight(
        item["file"],
        int(item["offset"]),
        shape,
        dtype,
        bool(item["transposed"]),
        None if rows is None else tuple(int(row) for row in rows),
    )


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
    again = "Compile the model again."
    data = read_json(inside(root, path.name), remedy=again)
    return parse(_Manifest, data, str(path), remedy=again).target
