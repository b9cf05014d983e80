"""What a program was at one moment, so that what a pass says of its changes can be checked.

A program after a pass shares producers with the one before it, so comparing the two does not show
a tensor that was changed where it lies. An imprint keeps the structure as data, each weight's
producer, and how often the tensors in memory had been written to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from graphopt.ir.graph import Program
from graphopt.ir.serialize import program_to_json
from graphopt.ir.weights import Array, Producer

_NO_RESULT = ("name", "source", "notes", "weights")
"""Parts of a saved program that decide no number; weights are compared by their producers."""


def _structure(program: Program) -> dict[str, Any]:
    data = program_to_json(program)
    structure = {key: part for key, part in data.items() if key not in _NO_RESULT}
    structure["placements"] = {weight.name: weight.placement for weight in program.weights}
    return structure


def arrays(producer: Producer) -> Iterator[Array]:
    """Yield the tensors in memory that `producer` takes its value from."""
    if isinstance(producer, Array):
        yield producer
    elif dataclasses.is_dataclass(producer):
        for part in dataclasses.fields(producer):
            inner = getattr(producer, part.name)
            if isinstance(inner, Producer):
                yield from arrays(inner)


def _same_value(old: Producer, new: Producer) -> bool:
    if old is new or (type(old) is type(new) and not isinstance(old, Array) and old == new):
        return True
    both = [part.value for part in (old, new) if isinstance(part, Array)]
    return len(both) == 2 and both[0].dtype == both[1].dtype and torch.equal(*both)


class Imprint:
    """Structure, producers and write counts of `program` as it is now.

    Args:
        program: Its producers are kept alive; no weight is read.
    """

    def __init__(self, program: Program) -> None:
        self._structure = _structure(program)
        self._producers = {weight.name: weight.producer for weight in program.weights}
        self._writes = {
            name: [(array, array.value._version) for array in arrays(producer)]
            for name, producer in self._producers.items()
        }

    def written(self) -> str | None:
        """Return the name of a weight whose tensor was written to since, None if there is none."""
        for name, counted in self._writes.items():
            if any(array.value._version != count for array, count in counted):
                return name
        return None

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
            if not _same_value(self._producers[weight.name], weight.producer):
                return f"weight {weight.name!r} has another value"
        missing = self._producers.keys() - {weight.name for weight in program.weights}
        if missing:
            return f"weight {min(missing)!r} is gone"
        name = self.written()
        return None if name is None else f"weight {name!r} was written to where it lies"
