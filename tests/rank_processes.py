"""Several processes of one run, as torchrun starts them, each with a time limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120.0
"""How long a run of ranks may take by default; then all are killed, and what they said is shown."""


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, or minus the signal that killed it, and what it wrote."""

    rank: int
    code: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return (
            f"---- rank {self.rank} ended with {self.code}\n{self.stdout[-4000:]}\n"
            f"{self.stderr[-8000:]}"
        )


def free_port() -> int:
    """Return a port that nothing listens on."""
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def started(
    arguments: Sequence[str | Path], ranks: int = 2, environment: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Start `python ARGUMENTS` once for each rank, which meet under gloo or NCCL on this host."""
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        **(environment or {}),
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def ended(processes: Sequence[subprocess.Popen[str]], seconds: float = SECONDS) -> list[Ended]:
    """Return how ranks ended; after so many seconds those that have not are killed.

    Raises:
        AssertionError: A rank did not end by itself, with what all of them wrote.
    """
    until = time.monotonic() + seconds
    written: list[tuple[str, str]] = []
    late: list[int] = []
    for rank, process in enumerate(processes):
        try:
            written.append(process.communicate(timeout=max(until - time.monotonic(), 0.1)))
        except subprocess.TimeoutExpired:
            late.append(rank)
            process.kill()
            written.append(process.communicate())
    results = [
        Ended(rank, process.returncode, *texts)
        for rank, (process, texts) in enumerate(zip(processes, written, strict=True))
    ]
    said = "\n".join(map(str, results))
    assert not late, f"ranks {late} did not end within {seconds:.0f} seconds\n{said}"
    return results


def run_ranks(
    arguments: Sequence[str | Path],
    ranks: int = 2,
    *,
    seconds: float = SECONDS,
    environment: Mapping[str, str] | None = None,
) -> list[Ended]:
    """Run `python ARGUMENTS` as ranks, all of which are to succeed.

    Raises:
        AssertionError: One failed, or did not end in time, with what all of them wrote.
    """
    results = ended(started(arguments, ranks, environment), seconds)
    said = "\n".join(map(str, results))
    assert all(result.code == 0 for result in results), said
    return results
