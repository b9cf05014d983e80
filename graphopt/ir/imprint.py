"""What a program was at one moment, so that what a pass says of its changes can be checked.

A program after a pass shares producers with the one before it, so comparing the two does not show
a tensor that was changed where it lies. An imprint keeps the structure as data, each weight's
producer, and a checksum of each tensor in memory.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from graphopt.ir.graph import Program
from graphopt.ir.serialize import program_to_json
from graphopt.ir.weights import Array, Producer
from graphopt.support.tensor_bytes import tensor_bytes

_NO_RESULT = ("name", "source", "notes", "weights")
"""Parts of a saved program that decide no number; weights are compared by their producers."""

_SMALL = 1 << 16
"""Bytes up to which tensors in memory are told apart by their content."""


def _structure(program: Program) -> dict[str, Any]:
    data = program_to_json(program)
    parts = {key: part for key, part in data.items() if key not in _NO_RESULT}
    return {**parts, "tokenizer": program.tokenizer}


def arrays(producer: Producer) -> Iterator[Array]:
    """Yield the tensors in memory that `producer` takes its value from."""
    if isinstance(producer, Array):
        yield producer
    elif dataclasses.is_dataclass(producer):
        for part in dataclasses.fields(producer):
            inner = getattr(producer, part.name)
            for item in inner if isinstance(inner, tuple | list) else (inner,):
                if isinstance(item, Producer):
                    yield from arrays(item)


def checksum(value: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes, row-major; off the CPU, how often it was written to.

    Counting writes misses those that go past autograd, such as through a NumPy view.
    """
    if value.device.type != "cpu":
        return 0 if value.is_inference() else value._version
    return zlib.crc32(_bytes_of(value))


def _bytes_of(value: Tensor) -> Any:
    """Return the bytes of a tensor on the CPU, row-major, as a NumPy array."""
    return tensor_bytes(value).numpy()


def producer_key(producer: Producer) -> Hashable:
    """Return a key that two producers share only if they make the same value.

    The class and all fields count, whatever `==` of the class says. Large tensors in memory count
    by identity, so that producers without a common key may yet have equal values; the producers
    must be kept alive for as long as their keys are used.
    """
    return _key(producer)


def _key(item: Any) -> Hashable:
    if isinstance(item, Tensor):
        if item.nbytes > _SMALL or item.device.type != "cpu":
            return ("tensor", id(item))
        return ("content", item.dtype, tuple(item.shape), _bytes_of(item).tobytes())
    if isinstance(item, tuple | list):
        return (type(item), *map(_key, item))
    if isinstance(item, slice):
        return ("slice", item.start, item.stop, item.step)
    if isinstance(item, Producer) and dataclasses.is_dataclass(item):
        fields = dataclasses.fields(item)
        return (type(item), *(_key(getattr(item, part.name)) for part in fields))
    if isinstance(item, Producer):
        return ("object", id(item))
    try:
        hash(item)
    except TypeError:
        return ("object", id(item))
    return (type(item), item)


def same_producer(old: Producer, new: Producer) -> bool:
    """Return whether two producers make the same value; tensors in memory are compared."""
    if old is new or producer_key(old) == producer_key(new):
        return True
    both = [part.value for part in (old, new) if isinstance(part, Array)]
    return len(both) == 2 and both[0].dtype == both[1].dtype and torch.equal(*both)


class Imprint:
    """Structure, producers and checksums of `program` as it is now.

    Args:
        program: Its producers are kept alive; no weight is read.
    """

    def __init__(self, program: Program) -> None:
        self._structure = _structure(program)
        self._producers = {weight.name: weight.producer for weight in program.weights}
        self._placements = {weight.name: weight.placement for weight in program.weights}
        self._sums: dict[int, int] = {}
        for producer in self._producers.values():
            for array in arrays(producer):
                if id(array) not in self._sums:
                    self._sums[id(array)] = checksum(array.value)

    def written(self) -> str | None:
        """Return the name of a weight whose tensor was written to since, None if there is none."""
        sums: dict[int, int] = {}
        for name, producer in self._producers.items():
            for array in arrays(producer):
                if id(array) not in sums:
                    sums[id(array)] = checksum(array.value)
                if sums[id(array)] != self._sums.get(id(array)):
                    return name
        return None

    def changed_weights(self, program: Program) -> list[str]:
        """Return the names of weights that are new in `program`, or made to another value."""
        return [
            weight.name
            for weight in program.weights
            if weight.name not in self._producers
            or not same_producer(self._producers[weight.name], weight.producer)
        ]

    def difference(self, program: Program) -> str | None:
        """Return the first thing in which `program` is not what left this imprint.

        Returns:
            A clause such as `weight 'lm_head' has another value`; None where structure and
            values are the same. Names, notes and where a program came from don't count.
        """
        now = _structure(program)
        for key, was in self._structure.items():
            if now[key] != was:
                return f"the program's {key.replace('_', ' ')} changed"
        for weight in program.weights:
            if weight.name not in self._producers:
                return f"weight {weight.name!r} is new"
            if not same_producer(self._producers[weight.name], weight.producer):
                return f"weight {weight.name!r} has another value"
            if self._placements[weight.name] != weight.placement:
                return f"weight {weight.name!r} has another placement"
        missing = self._producers.keys() - {weight.name for weight in program.weights}
        if missing:
            return f"weight {min(missing)!r} is gone"
        name = self.written()
        return None if name is None else f"weight {name!r} was written to where it lies"
