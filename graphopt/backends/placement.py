"""Which form of a model runs, and on which device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from graphopt.errors import UsageError
from graphopt.ir.graph import Program
from graphopt.support.devices import AUTO, describe_device, found_gpu, free_bytes, usable_device

Backend = Literal["auto", "program", "torch", "onnx"]

ROOM_FOR_THE_REST = 0.8
"""The share of a GPU's free memory that weights may take where nobody asked for the GPU."""


@dataclass(frozen=True)
class Placement:
    """Where a model runs.

    Attributes:
        device: The device.
        why: Why it is not the GPU that is here; empty where there is none, or it is.
    """

    device: torch.device
    why: str = ""

    def sentence(self, backend: str) -> str:
        """Return what is said of it, in one line."""
        return f"{backend} on {describe_device(self.device)}{f': {self.why}' if self.why else ''}"


def place(name: str, backend: Backend, weight_bytes: int) -> Placement:
    """Return where a form of a model runs.

    Args:
        name: A device, or "auto": the GPU that is found, for forms that run faster there and
            whose weights have room in its memory, and otherwise the CPU.
        backend: The form.
        weight_bytes: What its weights take as it computes with them.

    Raises:
        UsageError: There is no such device, or ONNX is to run on a GPU.
        GraphoptError: The device cannot be used here.
    """
    if name != AUTO:
        device = usable_device(name)
        if backend == "onnx" and device.type != "cpu":
            raise UsageError(
                f"The ONNX form cannot run on {name!r}: it is in fp32, and ONNX Runtime's GPU "
                "kernels of its attention are in 16 bits.",
                "Leave --device out; or run another form, with --backend torch or program.",
            )
        return Placement(device)
    gpu, cpu = found_gpu(), torch.device("cpu")
    if gpu is None:
        return Placement(cpu)
    if backend == "onnx":
        return Placement(cpu, "it has no GPU kernels in fp32; --backend program runs there")
    free = free_bytes(gpu)
    if weight_bytes > free * ROOM_FOR_THE_REST:
        sizes = f"{weight_bytes / 1e9:.1f} GB of weights, and {free / 1e9:.1f} GB are free"
        return Placement(cpu, f"{sizes} on {describe_device(gpu)}")
    return Placement(gpu)


def weight_bytes(program: Program, itemsize: int) -> int:
    """Return what the weights of a program take.

    Args:
        itemsize: Bytes of a floating-point number as it computes with it.
    """
    return sum(
        weight.numel * (itemsize if weight.dtype.is_floating_point else weight.dtype.itemsize)
        for weight in program.used_weights()
    )
