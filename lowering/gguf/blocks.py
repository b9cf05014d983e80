"""Weights in the types of GGUF files: numbers, and blocks of 32 codes with one or two scales.

A block of `Q4_0` is a scale d and 32 codes of 4 bits, of which element i shares a byte with
element i + 16 and has its low bits: (code - 8) * d. `Q4_1` has a minimum m besides: code * d + m.
`Q8_0` has 32 codes with a sign: code * d. Scales and minima are fp16. So packed weights in groups
of 32, or of a multiple of it, are such blocks, where fp16 holds their scales.
Source: `ggml-quants.c` of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, quants
from torch import Tensor

from graphopt.files.finite import check_finite
from graphopt.files.safetensors import blocks
from graphopt.ir.weights import Dequantised, Producer
from graphopt.lowering.gguf_types import GGUF_TYPES
from graphopt.support.tensor_bytes import tensor_bytes

TYPES = {name: GGMLQuantizationType[name.upper()] for name in GGUF_TYPES}
"""The types that matrices may be asked to have, by the name a user gives."""

AT_THE_ENDS = ("token_embd.weight", "output.weight")
"""Matrices that lose most by few bits: they have 8 where blocks are asked for, as llama.cpp's own
4-bit files have more bits there than elsewhere."""

FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
}

NUMBERS = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
"""The types of numbers that are kept as they are."""

BLOCK = 32
"""Codes of a block."""

_LARGEST_EXACT = {4: (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1),
                  8: (GGMLQuantizationType.Q8_0, None)}  # fmt: skip
"""The types of symmetric and other codes, by their bits."""


def nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Return how many bytes a tensor takes in a type."""
    elements, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // elements * size


def number_type(producer: Producer) -> GGMLQuantizationType:
    """Return the type in which a dense tensor is kept: vectors, such as gains, in fp32."""
    if len(producer.shape) < 2:
        return GGMLQuantizationType.F32
    return NUMBERS.get(producer.dtype, GGMLQuantizationType.F32)


def type_of_codes(weight: Dequantised) -> GGMLQuantizationType | str:
    """Return the type whose blocks may hold a packed weight, or why there is none."""
    encoding = weight.encoding
    if encoding.axis != 1:
        return "its groups lie along axis 0, and blocks along the inputs"
    if encoding.bits not in _LARGEST_EXACT:
        return f"there is no type of {encoding.bits} bits with one scale for {BLOCK} codes"
    if encoding.group % BLOCK:
        return f"its groups are of {encoding.group} codes, and blocks of {BLOCK}"
    symmetric, other = _LARGEST_EXACT[encoding.bits]
    kind = symmetric if encoding.symmetric else other
    return kind or f"there is no type of {encoding.bits} bits with zero points"


def held_by_fp16(weight: Dequantised) -> bool:
    """Return whether fp16 holds the scales of a packed weight, and its minima, exactly."""
    scales = weight.scales.load().double()
    held = scales.half().double().equal(scales)
    if weight.zeros is not None:
        minima = _minima(weight, scales)
        held = held and minima.half().double().equal(minima)
    return held


def _minima(weight: Dequantised, scales: Tensor) -> Tensor:
    """Return what code 0 stands for, [out, groups]."""
    assert weight.zeros is not None
    zeros = weight.encoding.zero_points(weight.zeros.load(), scales.shape[1])
    return -zeros.to(scales.dtype) * scales


@dataclass(frozen=True)
class Stored:
    """A tensor as it is written.

    Attributes:
        source: Its values.
        kind: The type it is written in.
        exact: A packed weight whose codes are written, and its scales as fp16; otherwise values are
            rounded to blocks anew.
    """

    source: Producer
    kind: GGMLQuantizationType
    exact: bool = False

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """Yield the bytes in order.

        Args:
            name: What a message calls the tensor.

        Raises:
            SourceError: A value cannot be read, or is not finite.
        """
        if self.exact:
            assert isinstance(self.source, Dequantised)
            heads = _heads(self.source)
            for what, head in zip(("scales", "minima"), heads, strict=False):
                check_finite(f"{name} ({what} in fp16)", head)
            yield _codes_as_blocks(self.source, heads).numpy()
            return
        for value in blocks(self.source):
            check_finite(name, value)
            if self.kind == NUMBERS.get(value.dtype):
                yield tensor_bytes(value).numpy()
            else:
                yield quants.quantize(value.float().numpy(), self.kind).view(np.uint8)


def _heads(weight: Dequantised) -> list[Tensor]:
    """Return what begins the blocks of each group, fp16 [out, groups]: scales, and minima."""
    scales = weight.scales.load()
    halves = [scales] if weight.zeros is None else [scales, _minima(weight, scales.double())]
    return [half.half() for half in halves]


def _codes_as_blocks(weight: Dequantised, heads: list[Tensor]) -> Tensor:
    """Return the codes of a packed weight as blocks, uint8 [number of blocks, bytes].

    Args:
        heads: See `_heads`.
    """
    bits, per_group = weight.encoding.bits, weight.encoding.group // BLOCK
    codes = weight.encoding.codes(weight.packed.load()).reshape(-1, BLOCK)
    repeated = [
        head.flatten().repeat_interleave(per_group)[:, None].contiguous().view(torch.uint8)
        for head in heads
    ]
    if bits == 4:
        low, high = codes[:, : BLOCK // 2], codes[:, BLOCK // 2 :]
        body = low | (high << 4)
    else:
        body = codes ^ 0x80  # codes less 128, as bytes with a sign
    return torch.cat([*repeated, body], 1)
