"""Where a weight, a state or a call belongs where a program has more than one device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt.ir.types import Dim

_DEVICE = re.compile(r"[a-z]+(:\d+)?", flags=re.ASCII)


@dataclass(frozen=True, slots=True)
class Placement:
    """The devices of a weight, a state or a call.

    The ranks of a program are the places in `devices`. A program whose weights are placed is what
    every rank runs: the values inside its functions have the sizes of one rank's parts, and the
    shape of the weight or the heads of the state are those of the whole.

    Attributes:
        devices: As torch calls them, such as `cuda:0` and `cpu`, one a rank; on several without an
            axis there is a copy on each.
        axis: The axis of the tensor that is split into equal parts; None for the whole. A state's
            axes are those of its keys [B, G, tokens, head size].
        sections: How many equal sections the axis consists of. Each is split, and a device has its
            part of every section, side by side: such as the gates and the ups of one matrix, or the
            experts whose neurons lie side by side.
        copies: How many neighbouring devices have the same part, such as a key head that several
            ranks' query heads read.
        summed: Whether the devices' tensors add up to the whole: the first has it, the others
            zeros, such as a bias that is added to partial sums.

    Raises:
        ValueError: There is no device, one is there twice or is none, one device has a part, or
            what says how an axis is split stands without an axis or does not come out even.
    """

    devices: tuple[str, ...]
    axis: int | None = None
    sections: int = 1
    copies: int = 1
    summed: bool = False

    def __post_init__(self) -> None:
        for device in self.devices:
            if not _DEVICE.fullmatch(device):
                raise ValueError(f"{device!r} is no device such as cuda:0 or cpu")
        if not self.devices or len(set(self.devices)) < len(self.devices):
            raise ValueError(f"a placement on {list(self.devices)}: name each device once")
        if self.axis is not None and (self.axis < 0 or len(self.devices) < 2):
            raise ValueError(f"axis {self.axis} split over {len(self.devices)} devices")
        if self.axis is None and (self.sections, self.copies) != (1, 1):
            raise ValueError("sections and copies of parts, and no axis is split")
        if self.summed and (self.axis is not None or len(self.devices) < 2):
            raise ValueError("what adds up is a whole tensor on each of several devices")
        if self.sections < 1 or not 1 <= self.copies < max(len(self.devices), 2):
            raise ValueError(f"{self.sections} sections, {self.copies} copies")
        if len(self.devices) % self.copies:
            raise ValueError(f"{self.copies} copies of each part on {len(self.devices)} devices")

    @property
    def parts(self) -> int:
        """How many different parts the axis is split into; 1 where none is."""
        return 1 if self.axis is None else len(self.devices) // self.copies

    def part_of(self, rank: int) -> int:
        """Return the number of the part that a rank has."""
        return 0 if self.axis is None else rank // self.copies

    def local(self, shape: Sequence[Dim]) -> tuple[Dim, ...]:
        """Return the shape of a rank's part of a tensor that `check` accepts."""
        sizes = list(shape)
        if self.axis is not None:
            whole = sizes[self.axis]
            assert isinstance(whole, int)
            sizes[self.axis] = whole // self.parts
        return tuple(sizes)

    def check(self, shape: Sequence[Dim]) -> None:
        """Check that a tensor of this shape can be placed so.

        Raises:
            ValueError: The axis is not there, or does not split into equal parts.
        """
        if self.axis is None:
            return
        if self.axis >= len(shape):
            raise ValueError(f"{list(shape)} has no axis {self.axis} to split")
        size, parts = shape[self.axis], self.parts
        if not isinstance(size, int) or size % (parts * self.sections):
            each = "" if self.sections == 1 else f" each of {self.sections} sections"
            raise ValueError(f"axis {self.axis} of {list(shape)}{each} in {parts} parts")

    def __str__(self) -> str:
        words = list(self.devices)
        if self.axis is not None:
            words.append(f"axis={self.axis}")
            words += [f"sections={self.sections}"] if self.sections > 1 else []
            words += [f"copies={self.copies}"] if self.copies > 1 else []
        words += ["summed"] if self.summed else []
        return f"placed({', '.join(words)})"
