"""Which form of a model runs, and on which device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from graphopt.errors import GraphoptError, UsageError
from graphopt.ir.graph import Program
from graphopt.support.devices import AUTO, describe_device, found_gpu, free_bytes, usable_device
from graphopt.support.ranks import here

Backend = Literal["auto", "program", "torch", "onnx"]

ROOM_FOR_THE_REST = 0.8
"""The share of a GPU's free memory that weights may take where nobody asked for the GPU."""


@dataclass(frozen=True)
class Placement:
    """Where a model runs.

    Attributes:
        device: The device; of several ranks what theirs are called without a number.
        why: Why it is not the GPU that is here; empty where there is none, or it is.
        ranks: How many processes run it, each on a device of its own; 0 for this one alone.
        by_layer: Whether weights are brought to the device a layer at a time.
    """

    device: torch.device
    why: str = ""
    ranks: int = 0
    by_layer: bool = False

    def sentence(self, backend: str) -> str:
        """Return what is said of it, in one line."""
        where = f"{self.ranks} ranks on " if self.ranks else ""
        where += describe_device(self.device)
        return f"{backend} on {where}{f': {self.why}' if self.why else ''}"


def place(
    name: str, backend: Backend, weight_bytes: int, ranks: int = 0, by_layer: bool = False
) -> Placement:
    """Return where a form of a model runs.

    Args:
        name: A device, or "auto": the GPU that is found, for forms that run faster there and
            whose weights have room in its memory, and otherwise the CPU.
        backend: The form.
        weight_bytes: What its weights take as it computes with them.
        ranks: Over how many devices they are split; 0 for one device.
        by_layer: Let a program whose weights have no room on a GPU run there all the same, a layer
            at a time.

    Raises:
        UsageError: There is no such device, or ONNX is to run on a GPU; or one device is named for
            several ranks.
        GraphoptError: The device cannot be used here, or there are fewer than ranks.
    """
    if ranks:
        return _place_ranks(name, weight_bytes, ranks)
    if name != AUTO:
        device = usable_device(name)
        if backend == "onnx" and device.type != "cpu":
            raise UsageError(
                f"The ONNX form cannot run on {name!r}: it is in fp32, and ONNX Runtime's GPU "
                "kernels of its attention are in 16 bits.",
                "Leave --device out; or run another form, with --backend torch or program.",
            )
        if by_layer and backend == "program" and device.type == "cuda":
            return _with_room(device, weight_bytes)
        return Placement(device)
    gpu, cpu = found_gpu(), torch.device("cpu")
    if gpu is None:
        return Placement(cpu)
    if backend == "onnx":
        return Placement(cpu, "it has no GPU kernels in fp32; --backend program runs there")
    if by_layer and backend == "program":
        return _with_room(gpu, weight_bytes)
    free = here().least(free_bytes(gpu))  # ranks that share a text are all in one sort of place
    if weight_bytes > free * ROOM_FOR_THE_REST:
        sizes = f"{weight_bytes / 1e9:.1f} GB of weights, and {free / 1e9:.1f} GB are free"
        return Placement(cpu, f"{sizes} on {describe_device(gpu)}")
    return Placement(gpu)


def _with_room(gpu: torch.device, weight_bytes: int) -> Placement:
    """Return a GPU, whose weights are brought there a layer at a time where they have no room."""
    free = here().least(free_bytes(gpu))
    if weight_bytes <= free * ROOM_FOR_THE_REST:
        return Placement(gpu)
    sizes = f"{weight_bytes / 1e9:.1f} GB of weights, and {free / 1e9:.1f} GB are free"
    return Placement(gpu, f"a layer at a time, with {sizes}", by_layer=True)


def _place_ranks(name: str, weight_bytes: int, ranks: int) -> Placement:
    """Return where the ranks of a model run: each on a GPU of its own, or all on the CPU."""
    split = f"The model is split over {ranks} devices"
    if name != AUTO:
        device = usable_device(name)
        if device.index is not None:
            raise UsageError(
                f"{split}, and {name!r} is one.",
                f"Give --device {device.type}, of which each rank takes its own; or compile "
                "without shard.",
            )
        here = 0 if device.type == "cpu" else torch.get_device_module(device).device_count()
        if device.type != "cpu" and here < ranks:
            raise GraphoptError(
                f"{split}, and torch finds {here} of {name!r} here.",
                "Leave --device out to run it on the CPU; or compile with another shard{tp}, or "
                "without.",
            )
        return Placement(device, ranks=ranks)
    cpu = torch.device("cpu")
    gpu = found_gpu()
    if gpu is None:
        return Placement(cpu, ranks=ranks)
    here = torch.cuda.device_count()
    if here < ranks:
        why = f"it is split over {ranks} devices, and torch finds {here} of 'cuda' here"
        return Placement(cpu, why, ranks)
    for number in range(ranks):
        one = torch.device("cuda", number)
        free, needed = free_bytes(one), weight_bytes / ranks
        if needed > free * ROOM_FOR_THE_REST:
            sizes = f"{needed / 1e9:.1f} GB of weights a rank, and {free / 1e9:.1f} GB are free"
            return Placement(cpu, f"{sizes} on {describe_device(one)}", ranks)
    return Placement(gpu, ranks=ranks)


def weight_bytes(program: Program, itemsize: int) -> int:
    """Return what the weights of a program take.

    Args:
        itemsize: Bytes of a floating-point number as it computes with it.
    """
    return sum(
        weight.numel * (itemsize if weight.dtype.is_floating_point else weight.dtype.itemsize)
        for weight in program.used_weights()
    )
