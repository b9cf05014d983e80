"""Time and memory of a piece of work."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _reset_peak() -> bool:
    """Set the high-water mark to what is resident now; False where the system can't."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """Return the high-water mark of resident memory in bytes; 0 where the system can't tell."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    with contextlib.suppress(ImportError):
        import resource  # which Windows lacks

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0


class Meter:
    """A context manager that measures its body, and may be nested.

    Attributes:
        seconds: Wall time, after the body.
        peak_bytes: Most resident memory while the body ran; where the system can't reset its
            high-water mark, the most since the process started.
    """

    _open: list[Meter] = []  # noqa: RUF012  (shared on purpose: one process, one high-water mark)

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0

    def __enter__(self) -> Meter:
        self._note()
        Meter._open.append(self)
        self._start = time.perf_counter()
        _reset_peak()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._note()
        Meter._open.remove(self)

    @staticmethod
    def _note() -> None:
        """Hand the mark to every open meter before it is reset."""
        peak = peak_rss()
        for meter in Meter._open:
            meter.peak_bytes = max(meter.peak_bytes, peak)
