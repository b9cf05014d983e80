"""Weights: named logical tensors whose values are produced when they are asked for.

A weight is a shape, a dtype and a producer. A producer is a slice of a file, or an expression
over other producers (rows, transposes), so a fused or transposed checkpoint tensor becomes
several logical weights without being read, and the way back to the checkpoint stays known.

What lies in a file of a weight is its encoding's to say: one tensor, or the several of a packed
one, whose value is what they stand for. An expression over a packed weight is dense.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import ClassVar

import torch

from graphopt.ir.encoding import Packed
from graphopt.ir.placement import Placement
from graphopt.ir.types import DTYPE_NAMES, Type


class Producer(ABC):
    """Where the value of a weight comes from.

    Attributes:
        encoding: How the value is stored where it is not dense.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    encoding: ClassVar[Packed | None] = None

    def tensors(self) -> dict[str, Producer]:
        """Return the dense tensors it is stored as, by suffix; a dense one is "" itself."""
        return {"": self}

    @abstractmethod
    def load(self) -> torch.Tensor:
        """Return the value: a tensor of `shape` and `dtype` on the CPU.

        Raises:
            SourceError: The value cannot be read.
        """

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows `start:stop` of dimension 0, reading no more than needed where possible."""
        return self.load()[start:stop]

    def load_part(self, axis: int, start: int, stop: int) -> torch.Tensor:
        """Return places `start:stop` of an axis, reading no more than needed where possible."""
        if axis == 0:
            return self.load_rows(start, stop)
        return self.load().narrow(axis, start, stop - start)


@dataclass(frozen=True, eq=False)
class Array(Producer):
    """A tensor held in memory: small constants, and what passes compute."""

    value: torch.Tensor

    def __repr__(self) -> str:
        return f"Array({Type(self.shape, self.dtype)})"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.value.dtype

    def load(self) -> torch.Tensor:
        return self.value.detach()


@dataclass(frozen=True)
class Missing(Producer):
    """No value: the model was captured from a bare config."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str

    def load(self) -> torch.Tensor:
        from graphopt.errors import SourceError

        raise SourceError(
            f"Weight {self.name!r} has no value: the program was captured from a config alone.",
            "Give a model folder, a .gguf file or 'demo' to work with weights.",
        )


def is_missing(producer: Producer) -> bool:
    """Return whether a producer, or one that it is made of, has no value."""
    if isinstance(producer, Missing) or not is_dataclass(producer):
        return isinstance(producer, Missing)
    parts = [getattr(producer, part.name) for part in fields(producer)]
    return any(is_missing(part) for part in parts if isinstance(part, Producer))


@dataclass(frozen=True)
class Rows(Producer):
    """Rows of another producer's dimension 0: a part of a fused projection.

    `index` is either a `slice` with a step or a tuple of row numbers.
    """

    source: Producer
    index: slice | tuple[int, ...]

    @property
    def _numbers(self) -> Sequence[int]:
        if isinstance(self.index, slice):
            return range(*self.index.indices(self.source.shape[0]))
        return self.index

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self._numbers), *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    def load(self) -> torch.Tensor:
        return self.load_rows(0, len(self._numbers))

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        numbers = self._numbers[start:stop]
        if not numbers:
            return self.source.load_rows(0, 0)
        low, high = min(numbers), max(numbers) + 1
        return _picked(self.source.load_rows(low, high), numbers, low)

    def load_part(self, axis: int, start: int, stop: int) -> torch.Tensor:
        if axis == 0:
            return self.load_rows(start, stop)
        return _picked(self.source.load_part(axis, start, stop), self._numbers, 0)


def _picked(rows: torch.Tensor, numbers: Sequence[int], first: int) -> torch.Tensor:
    """Return rows by their numbers; `first` is that of the first row."""
    if isinstance(numbers, range) and numbers.step > 0:
        return rows[numbers.start - first : numbers.stop - first : numbers.step]
    return rows[torch.tensor(numbers, dtype=torch.int64) - first]


@dataclass(frozen=True)
class Transposed(Producer):
    """The first two dimensions in the other order: GPT-2 keeps its projections as [in, out]."""

    source: Producer

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        rows, columns, *rest = self.source.shape
        return (columns, rows, *rest)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    def load(self) -> torch.Tensor:
        return self.source.load().transpose(0, 1)

    def load_part(self, axis: int, start: int, stop: int) -> torch.Tensor:
        own = 1 - axis if axis < 2 else axis
        return self.source.load_part(own, start, stop).transpose(0, 1)


@dataclass(frozen=True)
class Padded(Producer):
    """Another producer's value, and `rows` more rows of zeros behind it."""

    source: Producer
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.source.shape[0] + self.rows, *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    def load(self) -> torch.Tensor:
        return self.load_rows(0, self.shape[0])

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        given = self.source.shape[0]
        value = self.source.load_rows(min(start, given), min(stop, given))
        zeros = max(min(stop, self.shape[0]) - max(start, given), 0)
        return torch.cat([value, value.new_zeros(zeros, *self.source.shape[1:])])


@dataclass(frozen=True)
class Reshaped(Producer):
    """The same elements, row-major, in another shape."""

    source: Producer
    shape: tuple[int, ...]  # type: ignore[misc]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    def load(self) -> torch.Tensor:
        return self.source.load().reshape(self.shape)


@dataclass(frozen=True)
class Cast(Producer):
    """Another producer's value, rounded to another floating-point dtype.

    Attributes:
        source: Floating-point.
        dtype: Of the value.
        name: The weight's, for the message of an error.
    """

    source: Producer
    dtype: torch.dtype  # type: ignore[misc]
    name: str

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    def load(self) -> torch.Tensor:
        """Return the value.

        Raises:
            SourceError: A finite element is beyond the largest number of the dtype.
        """
        return self._rounded(self.source.load())

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        return self._rounded(self.source.load_rows(start, stop))

    def _rounded(self, value: torch.Tensor) -> torch.Tensor:
        from graphopt.errors import SourceError

        rounded = value.to(self.dtype)
        if rounded.isinf().any() and not value.isinf().any():
            largest = float(value.abs().max())
            raise SourceError(
                f"Weight {self.name!r} holds {largest:.6g}, and {DTYPE_NAMES[self.dtype]} ends at "
                f"{torch.finfo(self.dtype).max:.6g}.",
                "Store the weights as bfloat16, whose range is that of float32.",
            )
        return rounded


class SharedSources:
    """Loads producers that are made of the same sources, and reads each source once.

    What was read stays in memory until `forget`; the values are not to be changed in place.
    """

    def __init__(self) -> None:
        self._read: dict[Producer, torch.Tensor] = {}

    def load(self, producer: Producer) -> torch.Tensor:
        """Return a producer's value.

        Raises:
            SourceError: It cannot be read.
        """
        if isinstance(producer, Rows | Transposed | Padded | Reshaped | Cast):
            return replace(producer, source=Array(self.load(producer.source))).load()
        if isinstance(producer, Dequantised):
            tensors = {suffix: self.load(tensor) for suffix, tensor in producer.tensors().items()}
            return producer.encoding.dequantise(tensors)
        if producer not in self._read:
            self._read[producer] = producer.load()
        return self._read[producer]

    def forget(self) -> None:
        """Give up what was read."""
        self._read.clear()


@dataclass(frozen=True)
class Dequantised(Producer):
    """The matrix that packed codes stand for; see `graphopt.ir.encoding` for their layout.

    Raises:
        ValueError: The tensors are not those of the encoding.
    """

    encoding: Packed = field()  # type: ignore[misc]  # no default, unlike the base
    packed: Producer
    scales: Producer
    zeros: Producer | None = None

    def __post_init__(self) -> None:
        found = {suffix: (p.shape, p.dtype) for suffix, p in self.tensors().items()}
        wanted = self.encoding.stored(self.shape, self.dtype)
        if found != wanted:
            raise ValueError(f"{self.encoding} of {list(self.shape)} has {wanted}, not {found}")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.encoding.shape_of(self.packed.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.scales.dtype

    def tensors(self) -> dict[str, Producer]:
        found = {"packed": self.packed, "scales": self.scales}
        return found if self.zeros is None else found | {"zeros": self.zeros}

    def load(self) -> torch.Tensor:
        return self.encoding.dequantise({s: p.load() for s, p in self.tensors().items()})

    def load_rows(self, start: int, stop: int) -> torch.Tensor:
        if self.encoding.axis == 0:
            return self.load()[start:stop]
        rows = {s: p.load_rows(start, stop) for s, p in self.tensors().items()}
        return self.encoding.dequantise(rows)


@dataclass(frozen=True)
class Weight:
    """A logical tensor of the program.

    Programs share weights with their copies, so one is replaced in a store, never changed.

    Attributes:
        name: Unique name in the program; the checkpoint's own name where it is one tensor there.
        producer: Where the value comes from.
        checkpoint: The checkpoint tensor it is made of; None for a constant or a new weight.
        constant: True for a buffer the checkpoint does not hold (inverse frequencies and such).
        placement: Where it belongs; None on one device.
    """

    name: str
    producer: Producer
    checkpoint: str | None = None
    constant: bool = False
    placement: Placement | None = None

    def __repr__(self) -> str:
        return f"<Weight {self.name}: {self.type}>"

    def with_producer(self, producer: Producer) -> Weight:
        """Return the weight with another value."""
        return replace(self, producer=producer)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.producer.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.producer.dtype

    @property
    def encoding(self) -> Packed | None:
        """How it is stored; None where it is dense."""
        return self.producer.encoding

    @property
    def type(self) -> Type:
        """The whole of it, on however many devices."""
        return Type(self.shape, self.dtype, self.encoding)

    @property
    def local_type(self) -> Type:
        """What an op sees of it: all, or the part of one rank where it is split."""
        shape = self.shape if self.placement is None else self.placement.local(self.shape)
        return Type(shape, self.dtype, self.encoding)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes where it is stored."""
        return int(self.type.bytes)

    def tensors(self) -> list[Weight]:
        """Return the dense weights that a file holds of it: itself, or those of its encoding."""
        return [
            Weight(f"{self.name}.{suffix}", producer) if suffix else self
            for suffix, producer in self.producer.tensors().items()
        ]

    def load(
        self, dtype: torch.dtype | None = None, sources: SharedSources | None = None
    ) -> torch.Tensor:
        """Return the value on the CPU, cast to `dtype` when it is given and floating point.

        Args:
            sources: Through which it is read, if others read the same.
        """
        value = self.producer.load() if sources is None else sources.load(self.producer)
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        return value
