"""Weights that several forms of an output folder read from one file.

`model.py` reads tensors by name. Where another form has stored a tensor under that name, as it is,
the folder holds it once, and an index at the top says which file holds which tensor, in the format
that transformers has for shards. Paths in it are relative to the folder and may lead into folders
below it. Links between files would not do: the package `onnx` refuses data files with several hard
links, ONNX Runtime links that lead out of a model's folder, and copying undoes either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from graphopt.errors import SourceError
from graphopt.files.confined import inside
from graphopt.files.raw import RawTensor
from graphopt.files.safetensors import INDEX_NAME, WEIGHTS_NAME, read_header, read_weight_map
from graphopt.ir.graph import Program
from graphopt.storage.stored_weight import StoredWeight
from graphopt.support.plain import shown


def readable_by_name(place: StoredWeight) -> bool:
    """Return whether a weight lies as it is in a file whose tensors have names."""
    whole = not place.transposed and place.rows is None
    return whole and place.file.endswith(".safetensors")


def shared_weights(
    root: Path,
    program: Program,
    dtypes: Mapping[str, torch.dtype],
    stored: Mapping[str, StoredWeight],
) -> dict[str, StoredWeight]:
    """Return where weights lie under their own names, as `model.py` needs them.

    Args:
        root: The output folder.
        program: The program that is written.
        dtypes: In which its tensors are to be stored, by name.
        stored: Where other forms have stored weights.
    """
    headers: dict[str, dict[str, RawTensor]] = {}
    shared: dict[str, StoredWeight] = {}
    for weight in program.weights.tensors():
        place = stored.get(weight.name)
        if place is None or weight.constant or not readable_by_name(place):
            continue
        if place.file not in headers:
            headers[place.file] = read_header(root / place.file)
        tensor = headers[place.file].get(weight.name)
        if (
            tensor is not None
            and tensor.offset == place.offset
            and (tensor.shape, tensor.dtype) == (weight.shape, dtypes[weight.name])
        ):
            shared[weight.name] = place
    return shared


def write_index(root: Path, files: Mapping[str, str]) -> None:
    """Write which file below the folder holds which tensor."""
    index = {"metadata": {}, "weight_map": dict(sorted(files.items()))}
    (root / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def torch_weights(root: Path) -> dict[str, RawTensor]:
    """Return the tensors that `model.py` reads, by name, unread.

    Raises:
        SourceError: The index or a file is missing or damaged, a file lies outside the folder or
            is a link out of it, or lacks a tensor.
    """
    if not (root / INDEX_NAME).exists():
        return read_header(inside(root, WEIGHTS_NAME))
    headers: dict[str, dict[str, RawTensor]] = {}
    tensors: dict[str, RawTensor] = {}
    for name, file in read_weight_map(inside(root, INDEX_NAME)).items():
        if file not in headers:
            headers[file] = read_header(inside(root, file))
        if name not in headers[file]:
            raise SourceError(
                f"{root / INDEX_NAME} places tensor {shown(name)} in {shown(file)}, which does "
                "not hold it.",
                "Compile the model again.",
            )
        tensors[name] = headers[file][name]
    return tensors
