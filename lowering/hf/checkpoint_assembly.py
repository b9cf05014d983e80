"""Checkpoint tensors put together from the weights that capture cut out of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ir.cuts import transposed
from graphopt.ir.encoding import Packed
from graphopt.ir.weights import Dequantised, Missing, Producer, Reshaped, Rows, Transposed


@dataclass(frozen=True)
class Fragment:
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
    """A checkpoint tensor made of fragments, which fill it; its dtype holds the values of all."""

    shape: tuple[int, ...]  # type: ignore[misc]
    fragments: tuple[Fragment, ...]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        dtypes = (fragment.weight.dtype for fragment in self.fragments)
        return functools.reduce(torch.promote_types, dtypes)

    @property
    def encodings(self) -> list[Packed]:
        """Those of fragments that are packed, whose values it holds."""
        encodings = (fragment.weight.encoding for fragment in self.fragments)
        return [encoding for encoding in encodings if encoding is not None]

    def load(self) -> Tensor:
        whole = torch.empty(self.shape, dtype=self.dtype)
        for fragment in self.fragments:
            _place(whole, fragment)
        return whole


def _place(whole: Tensor, fragment: Fragment) -> None:
    """Write a fragment into views of the whole, so that no map of indices is needed."""
    view = whole
    for step in fragment.steps:
        if isinstance(step, Rows):
            if not isinstance(step.index, slice):
                # Listed rows are no view; they come last, where assignment takes them.
                view[torch.tensor(step.index)] = fragment.weight.load().to(view.dtype)
                return
            view = view[step.index]
        else:
            view = view.t() if isinstance(step, Transposed) else view.view(step.shape)
    view.copy_(fragment.weight.load())


def assemble(shape: tuple[int, ...], fragments: list[Fragment]) -> Producer:
    """Return the producer of a checkpoint tensor.

    It is packed where all fragments are, alike, and are rows of it; otherwise it is dense.

    Raises:
        ValueError: The fragments do not fill it, or cannot be put back.
    """
    if len(fragments) == 1 and not fragments[0].steps:
        return fragments[0].weight
    if len(fragments) == 1 and all(isinstance(step, Transposed) for step in fragments[0].steps):
        return transposed(fragments[0].weight)
    if (packed := _assemble_packed(shape, fragments)) is not None:
        return packed
    for fragment in fragments:
        listed = [isinstance(s, Rows) and not isinstance(s.index, slice) for s in fragment.steps]
        if any(listed[:-1]):
            raise ValueError("rows were chosen by a list and then changed")
    filled = torch.zeros(shape, dtype=torch.bool)
    for fragment in fragments:
        _place(
            filled, Fragment(fragment.steps, _Coverage(tuple(fragment.weight.shape), torch.bool))
        )
    if not bool(filled.all()):
        missing = int((~filled).sum())
        raise ValueError(f"{missing} of its {math.prod(shape)} elements are in no weight")
    return Assembled(shape, tuple(fragments))


def _assemble_packed(shape: tuple[int, ...], fragments: list[Fragment]) -> Producer | None:
    """Return a matrix of packed fragments, by the tensors they are stored as; None if dense."""
    alike = {(fragment.weight.encoding, fragment.weight.dtype) for fragment in fragments}
    (encoding, dtype), *others = alike
    if others or encoding is None or encoding.axis != 1:
        return None
    if any(not isinstance(step, Rows) for fragment in fragments for step in fragment.steps):
        return None
    tensors: dict[str, Producer] = {}
    for suffix, (stored, _) in encoding.stored(shape, dtype).items():
        cut = [Fragment(f.steps, f.weight.tensors()[suffix]) for f in fragments]
        tensors[suffix] = assemble(stored, cut)
    return Dequantised(encoding, **tensors)


@dataclass(frozen=True)
class _Coverage(Producer):
    """True everywhere, to see which elements fragments fill."""

    shape: tuple[int, ...]  # type: ignore[misc]
    dtype: torch.dtype  # type: ignore[misc]

    def load(self) -> Tensor:
        return torch.ones((), dtype=torch.bool).expand(self.shape)


@dataclass(frozen=True, eq=False)
class Derived(Producer):
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
    """Return [count, rows, ...]: every producer cut into `count` chunks of rows, the first
    chunks of all side by side, then the second ones."""
    rows = sum(source.shape[0] for source in sources) // count
    shape = (count, rows, *sources[0].shape[1:])

    def combine(*values: Tensor) -> Tensor:
        return torch.cat([value.unflatten(0, (count, -1)) for value in values], 1)

    return Derived(shape, sources, combine)


def stacked_columns(source: Producer, count: int) -> Producer:
    """Return [count, rows, columns / count]: a matrix cut into `count` chunks of columns."""
    rows, columns = source.shape

    def combine(value: Tensor) -> Tensor:
        return value.unflatten(1, (count, -1)).transpose(0, 1).contiguous()

    return Derived((count, rows, columns // count), (source,), combine)
