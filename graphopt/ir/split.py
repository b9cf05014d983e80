"""How a value lies on the ranks of a program, and which axes of a node are split together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from graphopt.ir.placement import Placement
from graphopt.ir.types import Type

Kinds = Sequence[Type | None]
"""Types of operands or results, of the whole values."""


@dataclass(frozen=True, slots=True)
class Split:
    """An axis of which every rank has a part; see `Placement` for sections and copies."""

    axis: int
    sections: int = 1
    copies: int = 1

    def parts(self, ranks: int) -> int:
        """Return how many different parts there are."""
        return ranks // self.copies

    def times(self, member: Split) -> Split:
        """Return the split of a member of an alignment whose base is split like this."""
        return Split(member.axis, self.sections * member.sections, self.copies * member.copies)

    def over(self, member: Split) -> Split | None:
        """Return the base of an alignment of which `member` is split like this; None for none."""
        fits = self.axis == member.axis and self.sections % member.sections == 0
        if not fits or self.copies % member.copies:
            return None
        return Split(0, self.sections // member.sections, self.copies // member.copies)

    def placement(self, devices: tuple[str, ...]) -> Placement:
        """Return the placement of a weight or state that is split so."""
        return Placement(devices, self.axis, self.sections, self.copies)

    def of_part(self, kind: Type, ranks: int) -> Type:
        """Return the type of a rank's part of a whole."""
        sizes = list(kind.shape)
        sizes[self.axis] = int(sizes[self.axis]) // self.parts(ranks)
        return Type(tuple(sizes), kind.dtype, kind.encoding)

    def of_whole(self, kind: Type, ranks: int) -> Type:
        """Return the type of the whole that a rank's part is of."""
        sizes = list(kind.shape)
        sizes[self.axis] = int(sizes[self.axis]) * self.parts(ranks)
        return Type(tuple(sizes), kind.dtype, kind.encoding)


Layout = Split | Literal["sum"] | None
"""A part of a whole, a summand of a sum over the ranks, or None for the same on every rank."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """Axes that are split together, as places among a node's operands and its results.

    Attributes:
        operands, results: How each is split, where the base is one section and one copy.
        sums: Places of results that are partial sums.
        unit: How many neighbouring entries of an axis stay together.
    """

    operands: Mapping[int, Split]
    results: Mapping[int, Split] = field(default_factory=dict)
    sums: tuple[int, ...] = ()
    unit: int = 1


def pointwise(
    operands: Kinds, results: Kinds, fixed: int = 0, places: Sequence[int] | None = None
) -> Iterator[Alignment]:
    """Yield the alignments of a node that broadcasts its operands and computes every entry alone.

    Args:
        fixed: How many axes, the last ones, are not split.
        places: Which operands have the results' axes; all by default.
    """
    made = results[0]
    assert made is not None
    for back in range(fixed + 1, len(made.shape) + 1):
        size = made.shape[-back]
        if not isinstance(size, int):
            continue
        members = {
            place: Split(len(kind.shape) - back)
            for place, kind in enumerate(operands)
            if kind is not None
            and (places is None or place in places)
            and len(kind.shape) >= back
            and kind.shape[-back] == size
        }
        axis = Split(len(made.shape) - back)
        yield Alignment(members, dict.fromkeys(range(len(results)), axis))
