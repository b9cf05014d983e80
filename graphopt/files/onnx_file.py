"""Checking an ONNX file before ONNX Runtime opens it: where its data lies, and what the data is."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import SourceError, first_line
from graphopt.files.confined import inside
from graphopt.files.finite import check_finite
from graphopt.files.raw import RawTensor

_AGAIN = "Compile the model again."

MODEL_NAME, VISION_NAME, EMBEDDING_NAME = "model.onnx", "vision.onnx", "embedding.onnx"
"""The graph that gives logits; and of a model that sees those of tower and words."""

OWN_CONSTANT = "constant_"
"""What the names of numbers begin with that a graph needs for itself, such as a mask's infinity."""


def check_onnx(path: Path, constants: Collection[str] = ()) -> None:
    """Refuse a model whose data lies outside its folder, or whose weights are not finite.

    Args:
        path: The model; its data may lie in other files of its folder.
        constants: Initializers that may hold infinity on purpose; none may hold NaN.

    Raises:
        SourceError: It is no ONNX model; or a tensor of it, in whatever part, names a file that is
            not in its folder or too short; or a weight holds NaN or Inf.
    """
    import onnx

    try:
        model = onnx.load(str(inside(path.parent, path.name)), load_external_data=False)
    except SourceError:
        raise
    except Exception as error:
        # protobuf's errors share no base class with a name of its own.
        raise SourceError(f"{path} is no ONNX model: {first_line(error)}.", _AGAIN) from error
    named = {tensor.name for tensor in model.graph.initializer}
    weights = {name for name in named if not name.startswith(OWN_CONSTANT)}.difference(constants)
    for tensor in _tensors(model):
        value = _value(path, tensor)
        if value is None or not value.is_floating_point():
            continue
        check_finite(tensor.name, value, constant=tensor.name not in weights)


def _tensors(message: Any) -> Iterator[Any]:
    """Yield every tensor in a protobuf message, in graphs inside attributes and functions too."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for item in value if _is_repeated(value) else (value,):
                yield from _tensors(item)


def _is_repeated(value: Any) -> bool:
    return not hasattr(value, "DESCRIPTOR")


def _value(path: Path, tensor: Any) -> torch.Tensor | None:
    """Return the value of a floating-point tensor; None of another one.

    Raises:
        SourceError: Its data lies outside the folder, or is not all there.
    """
    import onnx

    kinds = {
        onnx.TensorProto.FLOAT: torch.float32,
        onnx.TensorProto.DOUBLE: torch.float64,
        onnx.TensorProto.FLOAT16: torch.float16,
        onnx.TensorProto.BFLOAT16: torch.bfloat16,
    }
    dtype = kinds.get(tensor.data_type)
    if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data:
        if dtype is None:
            return None
        try:
            array = onnx.numpy_helper.to_array(tensor)
            return torch.from_numpy(array.astype("float32").copy())
        except (ValueError, TypeError) as error:
            raise SourceError(
                f"{path}: the tensor {tensor.name!r} is malformed: {first_line(error)}.", _AGAIN
            ) from error
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = inside(path.parent, entries.get("location", ""))
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", file.stat().st_size - offset))
    except ValueError as error:
        raise SourceError(
            f"{path}: the place of the tensor {tensor.name!r} is no number.", _AGAIN
        ) from error
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        raise SourceError(
            f"{file} is truncated: the tensor {tensor.name!r} of {path.name} ends at byte "
            f"{offset + length}, and the file has {file.stat().st_size}.",
            _AGAIN,
        )
    if dtype is None:
        return None
    if length != math.prod(tensor.dims) * dtype.itemsize:
        raise SourceError(
            f"{path}: the tensor {tensor.name!r} of shape {list(tensor.dims)} takes {length} "
            "bytes.",
            _AGAIN,
        )
    return RawTensor(file, offset, tuple(tensor.dims), dtype).load()
