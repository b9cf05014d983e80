"""Copies that run beside what is computed, and host memory that a device reads by itself."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.support.quantities import format_bytes


class Copies(ABC):
    """Copies that run beside what is computed."""

    @abstractmethod
    def start(self, copy: Callable[[], None]) -> Any:
        """Run a copy behind all that has been asked to be computed so far.

        Returns:
            What `wait` takes.
        """

    @abstractmethod
    def wait(self, copied: Any) -> None:
        """Let what is computed from here on begin when a copy has ended."""


class CopyStream(Copies):
    """Copies on a CUDA stream of their own, one behind the other."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, copy: Callable[[], None]) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            copy()
            done.record()
        return done

    def wait(self, copied: torch.cuda.Event) -> None:
        copied.wait(torch.cuda.current_stream(self._stream.device))


class CopyAtOnce(Copies):
    """Copies that are done when they are asked for: on a CPU."""

    def start(self, copy: Callable[[], None]) -> None:
        copy()

    def wait(self, copied: None) -> None:
        pass


def copies_on(device: torch.device) -> Copies:
    """Return what runs copies to and from a device."""
    return CopyStream(device) if device.type == "cuda" else CopyAtOnce()


def pin(host: Tensor, owner: object) -> None:
    """Pin host memory as long as its owner lives.

    torch's own pinned memory is handed out in powers of two: up to twice of what is asked for.

    Raises:
        GraphoptError: The system does not let so much be pinned.
    """
    runtime = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0))
    if status:
        raise GraphoptError(
            f"{host.nbytes:,} bytes ({format_bytes(host.nbytes)}) of host memory cannot be pinned "
            f"for the device (CUDA error {status}).",
            "Raise the limit of locked memory (ulimit -l), or lower the capacity.",
        )
    finalizer = weakref.finalize(owner, _unpin, host)
    finalizer.atexit = False


def _unpin(host: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
