"""The link between a device and its host: how long copies of blocks take."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from graphopt.errors import UsageError
from graphopt.targets import newest_gpu


@dataclass(frozen=True)
class Link:
    """Copies to the host and back, one at a time in each direction.

    A copy of S bytes takes S / bandwidth + latency.

    Attributes:
        out_bytes, in_bytes: Bytes a second from the device to the host, and back.
        out_ns, in_ns: Latency of a copy in nanoseconds.
        source: Where the figures come from, for reports.
    """

    out_bytes: float
    in_bytes: float
    out_ns: float = 0.0
    in_ns: float = 0.0
    source: str = "given"

    def out_time(self, size: float) -> float:
        """Return the nanoseconds of a copy of `size` bytes to the host."""
        return size / self.out_bytes * 1e9 + self.out_ns

    def in_time(self, size: float) -> float:
        """Return the nanoseconds of a copy of `size` bytes to the device."""
        return size / self.in_bytes * 1e9 + self.in_ns

    def round_trip(self, size: float) -> float:
        """Return the nanoseconds of a copy to the host and back."""
        return self.out_time(size) + self.in_time(size)

    def largest_hidden(self, gap: float) -> float:
        """Return the most bytes that go to the host and back within `gap` nanoseconds."""
        left = gap - self.out_ns - self.in_ns
        return max(left, 0.0) / 1e9 / (1 / self.out_bytes + 1 / self.in_bytes)

    def describe(self) -> str:
        """Return the link as a phrase."""
        return (
            f"{self.out_bytes / 1e9:.3g} GB/s out and {self.in_bytes / 1e9:.3g} GB/s in, "
            f"{self.out_ns / 1e3:.3g} and {self.in_ns / 1e3:.3g} us a copy ({self.source})"
        )


def default_link() -> Link:
    """Return the link that is assumed where nothing was measured: that of the newest GPU target.

    Its latencies are those of the published fit of pinned copies (see docs/memory.md).
    """
    target = newest_gpu("host_link")
    assert target.host_link is not None
    return Link(target.host_link, target.host_link, 8242.0, 12352.0, f"target {target.name}")


def fit_link(
    out_copies: list[tuple[int, float]], in_copies: list[tuple[int, float]], source: str
) -> Link:
    """Return the link whose lines pass closest to measured copies, by least squares.

    Squares of relative errors count, so that a small copy decides as much as a large one.

    Args:
        out_copies, in_copies: Bytes and nanoseconds of copies, of two sizes at least.
    """
    (out_slope, out_ns), (in_slope, in_ns) = _line(out_copies), _line(in_copies)
    return Link(1e9 / out_slope, 1e9 / in_slope, out_ns, in_ns, source)


def _line(copies: list[tuple[int, float]]) -> tuple[float, float]:
    """Return the slope and the offset of time by size; an offset is no less than 0."""
    size, time = np.array(copies, float).T
    a = np.stack([size / time, 1 / time], 1)
    slope, offset = np.linalg.lstsq(a, np.ones(len(size)), rcond=None)[0]
    if offset < 0:
        return float((size / time).sum() / ((size / time) ** 2).sum()), 0.0
    return float(slope), float(offset)


_BANDWIDTH = re.compile(r"\s*([\d.]+(?:e\d+)?)\s*([kMGT]?)B?(?:/s)?\s*", re.IGNORECASE)
_FACTOR = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def parse_link(text: str) -> Link:
    """Return the link of `--swap-bandwidth`: "25GB" both ways, or "6.4GB,6.3GB" out and in.

    Latencies, in microseconds, may follow: "6.4GB,6.3GB,8.2,12.4". Without, there are none.

    Raises:
        UsageError: The text says something else.
    """
    remedy = "Give a bandwidth such as 25GB (a second), or OUT,IN or OUT,IN,OUT_US,IN_US."
    parts = text.split(",")
    if len(parts) not in (1, 2, 4):
        raise UsageError(f"--swap-bandwidth {text!r} has {len(parts)} parts.", remedy)
    speeds = []
    for part in (parts * 2)[:2] if len(parts) == 1 else parts[:2]:
        found = _BANDWIDTH.fullmatch(part)
        try:
            speed = float(found[1]) * _FACTOR[found[2].lower()] if found else 0.0
        except ValueError:
            speed = 0.0
        if not 0 < speed < float("inf"):
            raise UsageError(f"--swap-bandwidth {text!r}: {part!r} is no bandwidth.", remedy)
        speeds.append(speed)
    latencies = [0.0, 0.0]
    try:
        latencies = [float(part) * 1e3 for part in parts[2:]] or latencies
    except ValueError:
        latencies = [-1.0, -1.0]
    if not all(0 <= latency < float("inf") for latency in latencies):
        raise UsageError(f"--swap-bandwidth {text!r}: a latency is no time.", remedy)
    return Link(speeds[0], speeds[1], latencies[0], latencies[1])


def measure_link(device: str, *, sizes: tuple[int, ...] = (), repeats: int = 5) -> Link:
    """Measure copies between a CUDA device and pinned memory of the host, and fit a line.

    Args:
        device: Such as "cuda".
        sizes: Bytes of the copies; by default from 4 KiB to 64 MiB.
        repeats: Copies of each size, whose median counts.
    """
    import statistics

    import torch

    sizes = sizes or tuple(4096 * 4**n for n in range(8))
    host = torch.empty(max(sizes), dtype=torch.uint8, pin_memory=True)
    there = torch.empty(max(sizes), dtype=torch.uint8, device=device)
    found: tuple[list[tuple[int, float]], list[tuple[int, float]]] = ([], [])
    for to, source, copies in ((host, there, found[0]), (there, host, found[1])):
        for size in sizes:
            times = []
            for _ in range(repeats + 1):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                to[:size].copy_(source[:size], non_blocking=True)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) * 1e6)
            copies.append((size, statistics.median(times[1:])))
    return fit_link(*found, f"measured on {torch.cuda.get_device_name(device)}")
