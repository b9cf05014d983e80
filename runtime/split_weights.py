"""Which part of a tensor a rank has, read from a file without the parts of others."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """How ranks share a tensor.

    Attributes:
        axis: The axis that is split into equal parts; None where the tensor is whole.
        sections: How many equal sections the axis consists of; a rank has its part of each.
        copies: How many neighbouring ranks have the same part.
        summed: The ranks' tensors add up to the whole: rank 0 has it, and the others have zeros.
        bits: Of numbers that lie packed along the axis, which is the last one, the lowest bits
            first; 0 where its elements are the numbers.
        numbers: How many of those there are.
    """

    axis: int | None = None
    sections: int = 1
    copies: int = 1
    summed: bool = False
    bits: int = 0
    numbers: int = 0


def own_part(file: Any, name: str, split: Split, rank: int, count: int) -> Tensor:
    """Return a rank's part of a tensor.

    Args:
        file: An open safetensors file; what is asked of it is read, and nothing else.
        count: How many ranks there are.
    """
    if split.axis is None:
        value: Tensor = file.get_tensor(name)
        return torch.zeros_like(value) if split.summed and rank else value
    if split.bits:
        return _packed_part(file.get_tensor(name), split, rank, count)
    whole = file.get_slice(name)
    ahead = [slice(None)] * split.axis
    places = _places(whole.get_shape()[split.axis], split, rank, count)
    parts = [whole[(*ahead, place)] for place in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, split.axis)


def _places(size: int, split: Split, rank: int, count: int) -> list[slice]:
    """Return what a rank has of an axis, section by section."""
    section = size // split.sections
    length = section * split.copies // count
    first = rank // split.copies * length
    return [slice(n * section + first, n * section + first + length) for n in range(split.sections)]


def _packed_part(packed: Tensor, split: Split, rank: int, count: int) -> Tensor:
    """Return a rank's part of numbers that lie packed in uint8 [..., bytes], packed anew."""
    order = torch.arange(8, device=packed.device)
    bits = ((packed[..., None] >> order) & 1).flatten(-2)[..., : split.numbers * split.bits]
    places = _places(split.numbers * split.bits, split, rank, count)
    own = torch.cat([bits[..., place] for place in places], -1)
    own = torch.nn.functional.pad(own, (0, -own.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (own << order).sum(-1).to(torch.uint8)
