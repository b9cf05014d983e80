"""The weights of a checkpoint, in files of a bounded size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from graphopt.files.safetensors import INDEX_NAME, WEIGHTS_NAME, SafetensorsWriter
from graphopt.ir.weights import Producer
from graphopt.support.progress import Progress

LARGEST_SHARD = 5 * 10**9
"""Bytes of a file beyond which another one is begun, as transformers does by default."""


def _shards(tensors: Mapping[str, Producer]) -> list[dict[str, Producer]]:
    """Divide tensors into files, in order."""
    shards: list[dict[str, Producer]] = [{}]
    size = 0
    for name, producer in tensors.items():
        count = math.prod(producer.shape) * producer.dtype.itemsize
        if shards[-1] and size + count > LARGEST_SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = producer
        size += count
    return shards


def write_shards(
    tensors: Mapping[str, Producer], folder: Path, progress: Progress
) -> tuple[dict[str, tuple[Path, int]], list[Path]]:
    """Write tensors, one at a time, and an index where they take several files.

    Returns:
        The file and the offset of each tensor by its name, and all files.

    Raises:
        SourceError: A value cannot be read or is not finite.
        GraphoptError: The disk is full.
    """
    places: dict[str, tuple[Path, int]] = {}
    files: list[Path] = []
    shards = _shards(tensors)
    done, total = 0, sum(math.prod(p.shape) * p.dtype.itemsize for p in tensors.values())
    for number, shard in enumerate(shards, start=1):
        path = folder / WEIGHTS_NAME
        if len(shards) > 1:
            path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        kinds = {name: (producer.shape, producer.dtype) for name, producer in shard.items()}
        with SafetensorsWriter(path, kinds) as writer:
            for name, producer in shard.items():
                progress("writing checkpoint", done, total)
                writer.copy(name, producer)
                places[name] = (path, writer.tensors[name].offset)
                done += writer.tensors[name].nbytes
        files.append(path)
    progress("writing checkpoint", total, total)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: path.name for name, (path, _) in sorted(places.items())},
        }
        path = folder / INDEX_NAME
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        files.append(path)
    return places, files
