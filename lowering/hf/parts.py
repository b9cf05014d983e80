"""Checkpoint tensors put together from the weights that capture cut out of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ir.weights import Missing, Producer, Reshaped, Rows, Transposed


@dataclass(frozen=True)
class Part:
    """A weight of the program, and where in a checkpoint tensor it belongs.

    Attributes:
        steps: The producers between the checkpoint tensor and the weight, innermost first.
        weight: The weight's value.
    """

    steps: tuple[Producer, ...]
    weight: Producer


def origin(producer: Producer) -> tuple[str, tuple[Producer, ...]]:
    """Return the name of the checkpoint tensor a weight without value is made of, and the steps.

    Raises:
        ValueError: It is not made of one tensor by rows, transposes and reshapes.
    """
    steps: list[Producer] = []
    while isinstance(producer, Rows | Transposed | Reshaped):
        steps.append(producer)
        producer = producer.source
    if not isinstance(producer, Missing):
        raise ValueError(f"a {type(producer).__name__} is no part of a checkpoint tensor")
    return producer.name, _rows_at_once(steps[::-1])


def _rows_at_once(steps: list[Producer]) -> tuple[Producer, ...]:
    """Return the steps with rows that are chosen among listed rows listed by their places."""
    made: list[Producer] = []
    for step in steps:
        last = made[-1] if made else None
        if isinstance(last, Rows) and not isinstance(last.index, slice) and isinstance(step, Rows):
            among = last.index
            rows = among[step.index] if isinstance(step.index, slice) else [
                among[row] for row in step.index
            ]  # fmt: skip
            made[-1] = Rows(last.source, tuple(rows))
        else:
            made.append(step)
    return tuple(made)


@dataclass(frozen=True, eq=False)
class Assembled(Producer):
    """A checkpoint tensor made of parts, which fill it."""

    shape: tuple[int, ...]  # type: ignore[misc]
    parts: tuple[Part, ...]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.parts[0].weight.dtype

    def load(self) -> Tensor:
        whole = torch.empty(self.shape, dtype=self.dtype)
        for part in self.parts:
            _place(whole, part)
        return whole


def _place(whole: Tensor, part: Part) -> None:
    """Write a part into views of the whole, so that no map of indices is needed."""
    view = whole
    for step in part.steps:
        if isinstance(step, Rows):
            if not isinstance(step.index, slice):
                # Listed rows are no view; they come last, where assignment takes them.
                view[torch.tensor(step.index)] = part.weight.load().to(view.dtype)
                return
            view = view[step.index]
        else:
            view = view.t() if isinstance(step, Transposed) else view.view(step.shape)
    view.copy_(part.weight.load())


def assemble(shape: tuple[int, ...], parts: list[Part]) -> Producer:
    """Return the producer of a checkpoint tensor.

    Raises:
        ValueError: The parts do not fill it, or cannot be put back.
    """
    if len(parts) == 1 and not parts[0].steps:
        return parts[0].weight
    if len(parts) == 1 and all(isinstance(step, Transposed) for step in parts[0].steps):
        return Transposed(parts[0].weight)
    for part in parts:
        listed = [isinstance(s, Rows) and not isinstance(s.index, slice) for s in part.steps]
        if any(listed[:-1]):
            raise ValueError("rows were chosen by a list and then changed")
    filled = torch.zeros(shape, dtype=torch.bool)
    for part in parts:
        _place(filled, Part(part.steps, _Mark(tuple(part.weight.shape), torch.bool)))
    if not bool(filled.all()):
        missing = int((~filled).sum())
        raise ValueError(f"{missing} of its {math.prod(shape)} elements are in no weight")
    return Assembled(shape, tuple(parts))


@dataclass(frozen=True)
class _Mark(Producer):
    """True everywhere, to see which elements parts fill."""

    shape: tuple[int, ...]  # type: ignore[misc]
    dtype: torch.dtype  # type: ignore[misc]

    def load(self) -> Tensor:
        return torch.ones((), dtype=torch.bool).expand(self.shape)


@dataclass(frozen=True, eq=False)
class Combined(Producer):
    """What a function makes of the values of other producers."""

    shape: tuple[int, ...]  # type: ignore[misc]
    sources: tuple[Producer, ...]
    combine: Callable[..., Tensor]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.sources[0].dtype

    def load(self) -> Tensor:
        return self.combine(*(source.load() for source in self.sources))


def stacked_rows(sources: tuple[Producer, ...], count: int) -> Producer:
    """Return [count, rows, ...]: every producer cut into `count` pieces of rows, the first
    pieces of all side by side, then the second ones."""
    rows = sum(source.shape[0] for source in sources) // count
    shape = (count, rows, *sources[0].shape[1:])

    def combine(*values: Tensor) -> Tensor:
        return torch.cat([value.unflatten(0, (count, -1)) for value in values], 1)

    return Combined(shape, sources, combine)


def stacked_columns(source: Producer, count: int) -> Producer:
    """Return [count, rows, columns / count]: a matrix cut into `count` pieces of columns."""
    rows, columns = source.shape

    def combine(value: Tensor) -> Tensor:
        return value.unflatten(1, (count, -1)).transpose(0, 1).contiguous()

    return Combined((count, rows, columns // count), (source,), combine)
