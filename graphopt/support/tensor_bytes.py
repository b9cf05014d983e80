"""The bytes of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor_bytes(value: Tensor) -> Tensor:
    """Return the bytes of a tensor, row-major, as uint8 [bytes] on the CPU: its own if it can.

    A tensor of one element counts as contiguous whatever its stride is, and torch views none as
    bytes whose stride is not 1.
    """
    flat = value.detach().cpu().contiguous().flatten()
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)
