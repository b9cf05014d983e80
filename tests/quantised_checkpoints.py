"""Checkpoints of quantised weights, written element by element by the formats' definitions.

Nothing here is shared with what reads them: codes are put into words as whole numbers of Python,
and what they stand for is computed in fp64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from torch import Tensor


@dataclass
class Quantised:
    """A matrix [out, in] of random codes.

    Attributes:
        codes: [out, in]; zeros: [out, groups]; scales: [out, groups], in their dtype.
        groups: The group of each input.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor
    bits: int

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        generator: torch.Generator,
        *,
        bits: int = 4,
        group: int | None = 16,
        symmetric: bool = False,
        dtype: torch.dtype = torch.float16,
        order: bool = False,
        least_zero: int = 1,
    ) -> Quantised:
        rows, length = shape
        size = length if group is None else group
        count = length // size
        codes = torch.randint(0, 2**bits, shape, generator=generator)
        zeros = torch.full((rows, count), 2 ** (bits - 1))
        if not symmetric:
            zeros = torch.randint(least_zero, 2**bits, (rows, count), generator=generator)
        # Values of a size at which logits of a tiny model are neither 0 nor beyond fp16.
        scales = (torch.rand(rows, count, generator=generator) + 0.5) * 0.4 / 2**bits
        groups = torch.arange(length) // size
        if order:
            groups = groups[torch.randperm(length, generator=generator)]
        return cls(codes, zeros, scales.to(dtype), groups, bits)

    def value(self) -> Tensor:
        """Return the matrix, computed in fp64, in the dtype of the scales."""
        scales, zeros = self.scales.double()[:, self.groups], self.zeros[:, self.groups]
        return ((self.codes - zeros).double() * scales).to(self.scales.dtype)


def words(codes: list[int], bits: int) -> list[int]:
    """Return codes as int32 words, the first in the lowest bits."""
    number = sum(code << (bits * index) for index, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [signed(number >> (32 * index)) for index in range(count)]


def signed(word: int) -> int:
    """Return the low 32 bits of a number as an int32 has them."""
    word %= 2**32
    return word - 2**32 if word >= 2**31 else word


def rows_in_words(matrix: Tensor, bits: int) -> Tensor:
    return torch.tensor([words(row, bits) for row in matrix.tolist()], dtype=torch.int32)


def gptq(matrix: Quantised, version: int = 1) -> dict[str, Tensor]:
    """Return the parts of a weight in GPTQ's format of a version."""
    taken = sum(1 << place for place in range(0, 32, matrix.bits)) if version == 1 else 0
    zeros = rows_in_words(matrix.zeros.t(), matrix.bits).tolist()
    return {
        "qweight": rows_in_words(matrix.codes, matrix.bits).t().contiguous(),
        "qzeros": torch.tensor(
            [[signed(word - taken) for word in row] for row in zeros], dtype=torch.int32
        ),
        "scales": matrix.scales.t().contiguous(),
        "g_idx": matrix.groups.to(torch.int32),
    }


def awq(matrix: Quantised) -> dict[str, Tensor]:
    """Return the parts of a weight in AWQ's version gemm."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def interleaved(codes: Tensor) -> Tensor:
        found = [
            [
                signed(sum(row[start + order[k]] << (4 * k) for k in range(8)))
                for start in range(0, len(row), 8)
            ]
            for row in codes.tolist()
        ]
        return torch.tensor(found, dtype=torch.int32)

    return {
        "qweight": interleaved(matrix.codes.t()),
        "qzeros": interleaved(matrix.zeros.t()),
        "scales": matrix.scales.t().contiguous(),
    }


def packed(matrix: Quantised) -> dict[str, Tensor]:
    """Return the parts of a weight in compressed-tensors' format pack-quantized."""
    parts = {
        "weight_packed": rows_in_words(matrix.codes, matrix.bits),
        "weight_scale": matrix.scales,
        "weight_shape": torch.tensor(matrix.codes.shape),
    }
    if bool((matrix.zeros != 2 ** (matrix.bits - 1)).any()):
        parts["weight_zero_point"] = rows_in_words(matrix.zeros.t(), matrix.bits).t().contiguous()
    return parts


def int8(matrix: Quantised) -> dict[str, Tensor]:
    """Return the parts of a weight in compressed-tensors' format int-quantized."""
    middle = 2 ** (matrix.bits - 1)
    parts = {
        "weight": (matrix.codes - middle).to(torch.int8),
        "weight_scale": matrix.scales,
    }
    if bool((matrix.zeros != middle).any()):
        parts["weight_zero_point"] = (matrix.zeros - middle).to(torch.int8)
    return parts


@dataclass
class Written:
    """A checkpoint, and the values that its quantised weights stand for."""

    folder: Path
    values: dict[str, Tensor]


def write(
    folder: Path,
    family: str,
    quantise: Callable[[str, tuple[int, ...]], tuple[dict[str, Tensor], Tensor] | None],
    config: dict[str, Any],
    **entries: Any,
) -> Written:
    """Write a tiny random model, some of whose matrices are quantised.

    Args:
        quantise: Returns the parts of a matrix by the name of its module and its shape, and its
            value; None for one that stays as it is.
        config: What config.json states beside the model's own entries.
    """
    source = save_tiny(folder / "dense", family, **entries)
    tensors = load_file(source / "model.safetensors")
    values: dict[str, Tensor] = {}
    for name in list(tensors):
        if not name.endswith(".weight") or tensors[name].dim() != 2:
            continue
        module = name.removesuffix(".weight")
        made = quantise(module, tuple(tensors[name].shape))
        if made is not None:
            parts, values[name] = made
            del tensors[name]
            tensors |= {f"{module}.{part}": value for part, value in parts.items()}
    target = folder / "quantised"
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    stated = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(stated))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return Written(target, values)
