"""Values that depend on the device: what a CPU does in a minute leaves a GPU idle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class PerDevice(Generic[T]):
    """One value for a CPU and one for a GPU.

    As the default of a pass's option it stands for what the option is where nobody gave one.
    """

    cpu: T
    gpu: T

    def on(self, device: torch.device) -> T:
        """Return the value for a device."""
        return self.gpu if device.type == "cuda" else self.cpu

    def __str__(self) -> str:
        return f"{self.cpu} on a CPU, {self.gpu} on a GPU"


def on_device(value: T | PerDevice[T], device: torch.device) -> T:
    """Return what an option is on a device: what was given, or the default there."""
    return value.on(device) if isinstance(value, PerDevice) else value
