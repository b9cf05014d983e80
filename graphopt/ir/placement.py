"""Where a weight, a state or a call belongs where a program has more than one device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.ir.types import Dim

_DEVICE = re.compile(r"[a-z]+(:\d+)?", flags=re.ASCII)


@dataclass(frozen=True, slots=True)
class Placement:
    """The devices of a weight, a state or a call.

    Nothing else in a program depends on it: what a call computes is the same on whatever device.

    Attributes:
        devices: As torch calls them, such as `cuda:0` and `cpu`; on several without an axis there
            is a copy on each.
        axis: The axis of the tensor that is split into equal parts, one a device; None for the
            whole. A state's axes are those of its keys [B, G, tokens, head size].

    Raises:
        ValueError: There is no device, one is there twice or is none, or one device has a part.
    """

    devices: tuple[str, ...]
    axis: int | None = None

    def __post_init__(self) -> None:
        for device in self.devices:
            if not _DEVICE.fullmatch(device):
                raise ValueError(f"{device!r} is no device such as cuda:0 or cpu")
        if not self.devices or len(set(self.devices)) < len(self.devices):
            raise ValueError(f"a placement on {list(self.devices)}: name each device once")
        if self.axis is not None and (self.axis < 0 or len(self.devices) < 2):
            raise ValueError(f"axis {self.axis} split over {len(self.devices)} devices")

    def check(self, shape: Sequence[Dim]) -> None:
        """Check that a tensor of this shape can be placed so.

        Raises:
            ValueError: The axis is not there, or does not split into equal parts.
        """
        if self.axis is None:
            return
        if self.axis >= len(shape):
            raise ValueError(f"{list(shape)} has no axis {self.axis} to split")
        size = shape[self.axis]
        if not isinstance(size, int) or size % len(self.devices):
            raise ValueError(f"axis {self.axis} of {list(shape)} in {len(self.devices)} parts")

    def __str__(self) -> str:
        axis = "" if self.axis is None else f", axis={self.axis}"
        return f"placed({', '.join(self.devices)}{axis})"
