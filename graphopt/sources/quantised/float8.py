"""Checkpoints of fp8 weights with scales, made dense: transformers' fine-grained fp8 and others.

A weight is stored as fp8 of its own shape, and beside it a scale for the whole, for each output
channel, or for each block [128, 128]; the value is their product. Eight bits of a float are an
encoding of no runtime here but of GPUs' fp8 units, so what is read is dense, in the dtype in which
the model computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from graphopt.ir.types import DTYPE_NAMES
from graphopt.ir.weights import Producer
from graphopt.sources.quantised.method import Method, ReadTensors, misshapen
from graphopt.support.inputs import OpenSchema, parse
from graphopt.support.plain import first_and_count

Positive = Annotated[int, Field(ge=1, le=2**20)]

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

SCALES = ("_scale_inv", "_scale")
"""What is put behind the name of a weight for that of its scales; either is multiplied."""

Block = tuple[int, int]
"""Rows and columns that share a scale."""

USUAL_BLOCK = (128, 128)

UNUSED = (".input_scale", ".output_scale", ".activation_scale", ".k_scale", ".v_scale")
"""Ends of names of scales of activations, which are not rounded here."""


@dataclass(frozen=True)
class ScaledFloat8(Producer):
    """fp8 [..., out, in] times its scales, in another dtype.

    Attributes:
        source: The fp8 values.
        scales: One number; [..., out, 1]; or one for each block, [..., out / rows, in / columns],
            rounded up.
        block: Rows and columns of a block.
    """

    source: Producer
    scales: Producer
    block: Block
    dtype: torch.dtype  # type: ignore[misc]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    def load(self) -> Tensor:
        return self.load_rows(0, self.shape[0])

    def load_rows(self, start: int, stop: int) -> Tensor:
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        value = self.source.load_rows(start, stop).float()
        scales = self.scales.load().float()
        if scales.numel() == 1:
            return (value * scales.flatten()).to(self.dtype)
        rows, columns = self.block
        if len(self.shape) > 2:
            scales = scales[start:stop]
            start, stop = 0, self.shape[-2]
        scales = scales.repeat_interleave(rows, -2)[..., start:stop, :]
        scales = scales.repeat_interleave(columns, -1)[..., : self.shape[-1]]
        return (value * scales).to(self.dtype)


def scaled(
    name: str, weight: Producer, scales: Producer, block: Block, dtype: torch.dtype, where: str
) -> ScaledFloat8:
    """Return an fp8 weight as its values.

    Args:
        block: The size of a block, where there are blocks.

    Raises:
        SourceError: The scales are neither one, nor one a channel, nor one a block.
    """
    if not scales.dtype.is_floating_point or len(weight.shape) < 2:
        raise misshapen(name, {"weight": weight, "scale": scales}, where)
    if math.prod(scales.shape) == 1:
        return ScaledFloat8(weight, scales, block, dtype)
    if len(scales.shape) == 1 and len(weight.shape) == 2:
        scales = _Column(scales)
    outer, (rows, columns) = weight.shape[:-2], weight.shape[-2:]
    if scales.shape == (*outer, rows, 1):
        return ScaledFloat8(weight, scales, (1, columns), dtype)
    if scales.shape == (*outer, -(-rows // block[0]), -(-columns // block[1])):
        return ScaledFloat8(weight, scales, block, dtype)
    raise misshapen(name, {"weight": weight, "scale": scales}, where)


@dataclass(frozen=True)
class _Column(Producer):
    """A vector as a matrix of one column."""

    source: Producer

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*self.source.shape, 1)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    def load(self) -> Tensor:
        return self.source.load()[:, None]


def read_float8(
    tensors: Mapping[str, Producer],
    block: Block,
    dtype: torch.dtype,
    where: str,
    result: ReadTensors,
) -> list[str]:
    """Add tensors to a result, fp8 ones that have scales as values; return the names of those.

    Args:
        tensors: Scales of activations among them are left out.
        block: The size of a block, where scales are of blocks.
        dtype: Of the values.

    Raises:
        SourceError: Scales do not fit their weight.
    """
    read: list[str] = []
    used: set[str] = set()
    for name, tensor in tensors.items():
        if tensor.dtype in FLOAT8:
            scale = next((name + end for end in SCALES if name + end in tensors), None)
            if scale is not None:
                result.tensors[name] = scaled(name, tensor, tensors[scale], block, dtype, where)
                read.append(name)
                used.add(scale)
    for name, tensor in tensors.items():
        if name not in result.tensors and name not in used and not name.endswith(UNUSED):
            result.tensors[name] = tensor
    return read


def made_dense(names: list[str], dtype: torch.dtype) -> str:
    """Return a note about fp8 weights that were read."""
    return f"{first_and_count(names)}: fp8 weights are read as {DTYPE_NAMES[dtype]} values"


class _Keys(OpenSchema):
    weight_block_size: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None


@dataclass(frozen=True)
class Float8(Method):
    """fp8 weights with scales beside them, whatever tool wrote them."""

    where: str
    block: Block

    @classmethod
    def of(cls, where: str, entries: Mapping[str, Any]) -> Float8:
        """Return the method of a config's entries.

        Raises:
            SourceError: They are malformed.
        """
        stated = parse(_Keys, dict(entries), where).weight_block_size
        return cls(where, USUAL_BLOCK if stated is None else (stated[0], stated[1]))

    def read(self, tensors: Mapping[str, Producer], dtype: torch.dtype) -> ReadTensors:
        result = ReadTensors()
        names = read_float8(tensors, self.block, dtype, self.where, result)
        if names:
            result.notes.append(
                f"{made_dense(names, dtype)}; activations, which fp8 kernels round, are not rounded"
            )
        return result
