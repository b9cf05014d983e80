"""What layers in host memory are made of: sizes, what they speak through, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.ir.kv_memory import row_bytes
from graphopt.runtime.copies import Copies
from graphopt.runtime.host_attention import Job
from graphopt.runtime.host_step import PieceStream

if TYPE_CHECKING:
    from graphopt.runtime.host_layer import HostLayer


@dataclass(frozen=True)
class LayerShape:
    """Key heads of a layer, sizes of its heads, and how its keys are kept.

    Attributes:
        bits: 8 where they are codes, else 16.
    """

    key_heads: int
    dim: int
    width: int
    dtype: torch.dtype
    bits: int = 16

    def rows(self) -> tuple[int, int, torch.dtype]:
        """Return the elements of a key and of a value in memory, and their dtype."""
        if self.bits == 16:
            return self.dim, self.width, self.dtype
        return row_bytes(self.dim, self.bits), row_bytes(self.width, self.bits), torch.uint8

    def token_bytes(self) -> int:
        """Return the bytes of a token of one text, keys and values."""
        k, v, dtype = self.rows()
        return self.key_heads * (k + v) * dtype.itemsize


@dataclass
class Mailbox:
    """Pinned memory through which one layer and the host's kernel speak, and the device's side.

    Attributes:
        q: [B, H, 1, D].
        k, v: [B, G, 1, row].
        lens: int32 [B].
        result: fp32 [B, H, Dv + 1], outputs of all heads, then their log-sum-exps.
        arrived: The same, on the device.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lens: Tensor
    result: Tensor
    arrived: Tensor

    @staticmethod
    def parts(result: Tensor, batch: int, heads: int, width: int) -> tuple[Tensor, Tensor]:
        """Return the output [B, H, 1, Dv] and the log-sum-exp [B, H, 1] of a result."""
        out, lse = result.split([batch * heads * width, batch * heads])
        return out.view(batch, heads, 1, width), lse.view(batch, heads, 1)


@dataclass
class HostStep:
    """What all layers in host memory share, of a step and besides.

    Attributes:
        batch, capacity: Rows, and tokens that each has room for.
        beside: Runs what the host does beside the device.
        pieces: Brings pieces to the device.
        run: Runs a job of the host's kernel, given the layer that it is for.
        pinned: Returns a little host memory that copies to and from the device go by.
        held: Tokens of each row before the step, as the host knows them.
        bound: At least as many as any row has; pieces up to it are read.
        decoding: Whether the step is one token, at any number of tokens up to `bound`.
    """

    batch: int
    capacity: int
    beside: Copies
    pieces: PieceStream
    run: Callable[[Job, HostLayer], None]
    pinned: Callable[[tuple[int, ...], torch.dtype], Tensor]
    held: list[int] = field(default_factory=list)
    bound: int = 0
    decoding: bool = False
