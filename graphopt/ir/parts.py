"""The part of a weight that one rank has, read without the parts of others."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from graphopt.ir.encoding import Packed, pack
from graphopt.ir.placement import Placement
from graphopt.ir.weights import Cast, Dequantised, Padded, Producer, Weight


@dataclass(frozen=True)
class Part(Producer):
    """One of the equal parts of another producer along an axis.

    Attributes:
        source: The whole.
        axis: The axis that is split.
        number: Which part.
        parts: How many there are.
        sections: How many equal sections the axis consists of; a part has its share of each.
    """

    source: Producer
    axis: int
    number: int
    parts: int
    sections: int = 1

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        sizes = list(self.source.shape)
        sizes[self.axis] //= self.parts
        return tuple(sizes)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    def load(self) -> torch.Tensor:
        section = self.source.shape[self.axis] // self.sections
        size = section // self.parts
        starts = [s * section + self.number * size for s in range(self.sections)]
        loaded = [self.source.load_part(self.axis, start, start + size) for start in starts]
        # A view would keep what it is a part of in memory.
        return loaded[0].clone() if len(loaded) == 1 else torch.cat(loaded, self.axis)


@dataclass(frozen=True)
class Zeros(Producer):
    """Zeros: what other ranks than the first have of a tensor that ranks add up."""

    shape: tuple[int, ...]  # type: ignore[misc]
    dtype: torch.dtype  # type: ignore[misc]

    def load(self) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class PackedZeroPoints(Producer):
    """Zero points of some groups of a packed weight, packed anew.

    Attributes:
        source: Zero points of all groups, uint8 [rows, bytes].
        codes: The encoding of the weight.
        groups: How many groups the whole has.
        part: How [rows, groups] is split, along axis 1.
        rank: Whose part it is.
    """

    source: Producer
    codes: Packed
    groups: int
    part: Placement
    rank: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        own = self.groups // self.part.parts
        return (self.source.shape[0], -(-own * self.codes.bits // 8))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    def load(self) -> torch.Tensor:
        points = self.codes.zero_points(self.source.load(), self.groups)
        sections = points.unflatten(1, (self.part.sections, self.part.parts, -1))
        own = sections[:, :, self.part.part_of(self.rank)].flatten(1)
        return pack(own, self.codes.bits)


def check_split(weight: Weight, placement: Placement) -> None:
    """Check that a weight can be placed so, also where it is packed.

    Raises:
        ValueError: The axis is not there, or does not split into equal parts, or a part of it would
            hold a part of a group of codes.
    """
    placement.check(weight.shape)
    encoding = weight.encoding
    if encoding is None or placement.axis is None:
        if encoding is not None and placement.summed:
            raise ValueError("packed codes, which have no zeros that others could add up with")
        return
    if placement.axis == encoding.axis:
        size = weight.shape[placement.axis]
        if size // encoding.group % (placement.parts * placement.sections) or size % encoding.group:
            raise ValueError(
                f"{size // encoding.group} groups of {encoding.group} codes along axis "
                f"{placement.axis} in {placement.parts} parts"
            )


def rank_part(producer: Producer, placement: Placement | None, rank: int) -> Producer:
    """Return what one rank has of a weight's value, unread.

    Args:
        placement: As the weight has it; `check_split` accepts it.
    """
    if placement is None or (placement.axis is None and not placement.summed):
        return producer
    if placement.summed:
        return producer if rank == 0 else Zeros(producer.shape, producer.dtype)
    axis = placement.axis
    assert axis is not None
    if isinstance(producer, Cast):
        return replace(producer, source=rank_part(producer.source, placement, rank))
    if isinstance(producer, Padded) and axis > 0:
        return replace(producer, source=rank_part(producer.source, placement, rank))
    if isinstance(producer, Dequantised):
        return _packed_part(producer, placement, rank)
    number = placement.part_of(rank)
    return Part(producer, axis, number, placement.parts, placement.sections)


def _packed_part(producer: Dequantised, placement: Placement, rank: int) -> Dequantised:
    """Return a rank's part of codes, scales and zero points, which lie [rows, groups, ...]."""
    encoding = producer.encoding
    by_groups = placement.axis == encoding.axis
    own = replace(placement, axis=1 if by_groups else 0)
    parts = {
        suffix: rank_part(tensor, own, rank)
        for suffix, tensor in producer.tensors().items()
        if suffix != "zeros" or not by_groups
    }
    if by_groups and producer.zeros is not None:
        groups = producer.scales.shape[1]
        parts["zeros"] = PackedZeroPoints(producer.zeros, encoding, groups, own, rank)
    return Dequantised(encoding, **parts)


def whole_of(producer: Producer) -> tuple[Producer, Hashable]:
    """Return what a producer is a part of, and which part; itself, and None, for no part.

    Rows of zeros behind it do not count.
    """
    if isinstance(producer, Part):
        which = producer.axis, producer.number, producer.parts, producer.sections
        source, inner = whole_of(producer.source)
        return source, (*which, inner)
    if isinstance(producer, Padded):
        source, inner = whole_of(producer.source)
        return source, ("padded", producer.rows, inner)
    if isinstance(producer, Cast):
        source, inner = whole_of(producer.source)
        return (replace(producer, source=source) if inner else producer), inner
    if isinstance(producer, PackedZeroPoints):
        return producer.source, (producer.part, producer.rank)
    if isinstance(producer, Dequantised):
        found = {suffix: whole_of(tensor) for suffix, tensor in producer.tensors().items()}
        inner = tuple(which for _, which in found.values())
        if any(inner):
            wholes = {suffix: source for suffix, (source, _) in found.items()}
            return Dequantised(producer.encoding, **wholes), inner
    return producer, None
