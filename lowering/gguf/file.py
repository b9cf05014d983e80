"""Writing a GGUF file: the header by the gguf package, and the tensors one at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from gguf import GGMLQuantizationType, GGUFEndian, GGUFValueType, GGUFWriter

from graphopt.errors import GraphoptError
from graphopt.lowering.gguf.blocks import AT_THE_ENDS, FILE_TYPES, Stored, nbytes
from graphopt.lowering.gguf.keys import Value
from graphopt.support.progress import Progress

_ALIGNMENT = 32
"""Where tensors begin: the format's default."""

_QUANTISATION_VERSION = 2
"""The version of the layouts of blocks, ggml's since 2023."""


def write_file(
    path: Path,
    architecture: str,
    keys: Mapping[str, Value],
    tensors: Mapping[str, Stored],
    progress: Progress,
) -> dict[str, int]:
    """Write a file, a tensor at a time; return where each begins.

    Args:
        architecture: The format's name of it.
        keys: All other entries but those that say of what types the tensors are.

    Raises:
        SourceError: A weight cannot be read, or is not finite.
        GraphoptError: The disk is full.
    """
    writer = GGUFWriter(None, architecture, endianess=GGUFEndian.LITTLE)
    writer.add_file_type(int(FILE_TYPES[most_common_type(tensors)]))
    writer.add_quantization_version(_QUANTISATION_VERSION)
    for key, value in keys.items():
        writer.add_key_value(key, value, _value_type(value), _item_type(value))
    for name, stored in tensors.items():
        writer.add_tensor_info(
            name, stored.source.shape, cast(Any, None), nbytes(stored.source.shape, stored.kind),
            raw_dtype=stored.kind,
        )  # fmt: skip
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return _append(path, tensors, progress)
    except OSError as error:
        raise GraphoptError(f"{path} cannot be written: {error.strerror or error}.") from error


def _append(path: Path, tensors: Mapping[str, Stored], progress: Progress) -> dict[str, int]:
    places: dict[str, int] = {}
    total = sum(nbytes(stored.source.shape, stored.kind) for stored in tensors.values())
    done = 0
    with path.open("ab") as file:
        for name, stored in tensors.items():
            progress("writing GGUF", done, total)
            file.write(bytes(-file.tell() % _ALIGNMENT))
            places[name] = file.tell()
            for piece in stored.pieces(name):
                file.write(piece.tobytes())
            size = file.tell() - places[name]
            assert size == nbytes(stored.source.shape, stored.kind), name
            done += size
        file.write(bytes(-file.tell() % _ALIGNMENT))
    progress("writing GGUF", total, total)
    return places


def most_common_type(tensors: Mapping[str, Stored]) -> GGMLQuantizationType:
    """Return the type that most elements have, beside the matrices at the ends."""
    counts: Counter[GGMLQuantizationType] = Counter()
    for name, stored in tensors.items():
        if name not in AT_THE_ENDS:
            counts[stored.kind] += math.prod(stored.source.shape)
    return counts.most_common(1)[0][0]


def _value_type(value: Value) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return GGUFValueType.UINT32
    if isinstance(value, float):
        return GGUFValueType.FLOAT32
    return GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.ARRAY


def _item_type(value: Value) -> GGUFValueType | None:
    if not isinstance(value, list):
        return None
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.INT32, float: GGUFValueType.FLOAT32}
    return kinds.get(type(value[0]), GGUFValueType.STRING) if value else GGUFValueType.STRING
