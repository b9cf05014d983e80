"""What a caching allocator holds beside what is used: rounding, and gaps that nothing fits into.

Reads the segments of `torch.cuda.memory_snapshot()`, as they are or as the allocator's history
gives them. Nothing of torch is imported: a snapshot is plain data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Fragmentation:
    """The memory of an allocator at one moment.

    Attributes:
        reserved: Bytes of all segments: what the allocator took from the device.
        active: Bytes of blocks in use, and of those that wait for another stream.
        requested: Bytes that were asked for; the rest of `active` is rounding.
        free: Bytes that are free within segments.
        largest_free: Bytes of the largest free block.
        segments: How many there are.
    """

    reserved: int
    active: int
    requested: int
    free: int
    largest_free: int
    segments: int

    @property
    def rounding(self) -> int:
        """Bytes in use that nobody asked for."""
        return self.active - self.requested

    @property
    def idle_share(self) -> float:
        """The share of what was reserved that is not in use."""
        return 1 - self.active / self.reserved if self.reserved else 0.0

    @property
    def external(self) -> float:
        """The share of the free bytes that is not in the largest free block (0: one piece)."""
        return 1 - self.largest_free / self.free if self.free else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self) | {
            "rounding": self.rounding,
            "idle_share": self.idle_share,
            "external": self.external,
        }


def fragmentation(
    segments: Sequence[Mapping[str, Any]], device: int | None = None
) -> Fragmentation:
    """Return what segments of a caching allocator hold.

    Args:
        segments: Of `torch.cuda.memory_snapshot()`, or under "segments" in a dumped snapshot.
        device: Number of the device; all by default.

    Raises:
        ValueError: A segment's blocks don't add up to its size.
    """
    reserved = active = requested = free = largest = count = 0
    for segment in segments:
        if device is not None and segment.get("device", 0) != device:
            continue
        count += 1
        reserved += segment["total_size"]
        held = 0
        for block in segment["blocks"]:
            size = block["size"]
            held += size
            if block["state"] == "inactive":
                free += size
                largest = max(largest, size)
            else:
                active += size
                requested += block.get("requested_size", size)
        if held != segment["total_size"]:
            raise ValueError(
                f"a segment of {segment['total_size']} bytes has blocks of {held} bytes"
            )
    return Fragmentation(reserved, active, requested, free, largest, count)
