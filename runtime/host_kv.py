"""The memory of all layers whose keys and values lie on the host, and what their steps share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.ir.kv_host import HostShare, piece_tokens, prefill_chunk
from graphopt.runtime.copies import Copies, copies_on, pin
from graphopt.runtime.host_attention import Job, NoHostKernel, host_kernel, host_memory
from graphopt.runtime.host_layer import HostLayer
from graphopt.runtime.host_parts import HostStep, LayerShape
from graphopt.runtime.host_step import PieceStream, run_in_torch, run_job, warn_of_torch
from graphopt.support.free_memory import free_bytes
from graphopt.support.quantities import format_bytes

IN_TORCH = "GRAPHOPT_HOST_ATTENTION"
"""Environment variable; `torch` allows attention on the host without a compiler, in torch."""


class HostKV:
    """Keys and values in host memory, of the layers of a model that have some there.

    Args:
        shares: Of each such layer.
        shapes: Of each such layer.
        capacity: Tokens that a row has room for.
        seq_lens: int32 [B], on the device, read at every step.
        piece: Tokens of a piece; by default those of `piece_tokens`.
        copies, beside: What runs copies to the device, and what the host does beside it.

    Attributes:
        layers: In the order in which they attend.
        step: What they share of a step.
        records: Whether a CUDA graph can hold a step.

    Raises:
        ValueError: More tokens or rows than was planned for.
        GraphoptError: The host has too little memory, with how much is needed; or there is no
            compiler, and the user has not allowed attention in torch.
    """

    def __init__(
        self,
        shares: Sequence[HostShare],
        shapes: Sequence[LayerShape],
        capacity: int,
        seq_lens: Tensor,
        *,
        piece: int | None = None,
        copies: Copies | None = None,
        beside: Copies | None = None,
    ) -> None:
        self.capacity, self.batch, self.device = capacity, len(seq_lens), seq_lens.device
        for share in shares:
            if capacity > share.context or self.batch > share.batch:
                raise ValueError(
                    f"{self.batch} texts of {capacity:,} tokens: keys and values were placed for "
                    f"{share.batch} of {share.context:,}; run place-kv with a larger context or "
                    "batch, and emit the model again"
                )
        refused = _why_in_torch()
        self.records = refused is None  # Python is no node of a graph
        pieces = [self._pieces(share, piece) for share in shares]
        sizes = [
            self.batch * count * tokens * shape.token_bytes()
            for shape, (count, tokens) in zip(shapes, pieces, strict=True)
        ]
        memory = self._memory(sum(sizes), max(sizes), refused is None)
        largest = max(size // count for size, (count, _) in zip(sizes, pieces, strict=True))
        incoming = copies_on(self.device) if copies is None else copies
        self.pieces = PieceStream(incoming, largest, self.device)
        # Layers know what they share, and not who holds them: nothing waits for Python's collector.
        self.step = HostStep(
            self.batch, capacity, copies_on(self.device) if beside is None else beside, self.pieces,
            _runner(self.device, refused), _pinned_for(self.device),
        )  # fmt: skip
        self.layers = [
            self._layer(share, shape, part, count, tokens, seq_lens)
            for share, shape, part, (count, tokens) in zip(
                shares, shapes, memory.split(sizes), pieces, strict=True
            )
        ]
        self.granule = min(tokens for _, tokens in pieces)

    def _pieces(self, share: HostShare, piece: int | None) -> tuple[int, int]:
        """Return how many pieces of how many tokens a layer has on the host."""
        tokens = max(self.capacity - share.resident, 1)
        each = piece or piece_tokens(tokens, self.batch)
        return -(-tokens // each), each

    def _memory(self, needed: int, part: int, by_kernel: bool) -> Tensor:
        free = free_bytes(torch.device("cpu"))
        if needed > free:
            raise GraphoptError(
                f"Keys and values of {self.batch} texts of {self.capacity:,} tokens take "
                f"{needed:,} bytes ({format_bytes(needed)}) of host memory, and "
                f"{format_bytes(free)} are free.",
                "Lower the capacity or the batch, or give place-kv a larger gpu=.",
            )
        memory = host_memory(needed, part) if by_kernel else _zeros(needed)
        if self.device.type == "cuda":
            pin(memory, self)
        return memory

    def _layer(
        self, share: HostShare, shape: LayerShape, part: Tensor, count: int, tokens: int,
        seq_lens: Tensor,
    ) -> HostLayer:  # fmt: skip
        k_row, v_row, dtype = shape.rows()
        lead = (count, self.batch, shape.key_heads, tokens)
        k_bytes = self.batch * count * tokens * shape.key_heads * k_row * dtype.itemsize
        k, v = part.split([k_bytes, len(part) - k_bytes])
        host = (k.view(dtype).view(*lead, k_row), v.view(dtype).view(*lead, v_row))
        front = None
        resident = min(share.resident, self.capacity)
        if resident:
            room = resident + min(prefill_chunk(self.batch), self.capacity)
            k_front, v_front = (
                torch.zeros(self.batch, shape.key_heads, room, row, dtype=dtype, device=self.device)
                for row in (k_row, v_row)
            )
            front = (k_front, v_front)
        return HostLayer(self.step, share, shape, host, front, seq_lens)

    def begin_step(self, held: Sequence[int], decoding: bool) -> None:
        """Begin to bring what a step reads.

        Args:
            held: Tokens of each row before it.
            decoding: Whether it is one token; what is recorded then serves up to `bound` tokens.
        """
        longest = max(held)
        bound = -(-longest // self.granule) * self.granule if decoding else longest
        self.step.held, self.step.bound, self.step.decoding = [*held], bound, decoding
        self.wait_for_writing()
        self.pieces.begin(
            [(layer, number) for layer in self.layers for number in layer.streamed(self.step)]
        )

    def wait_for_writing(self) -> None:
        """Let what follows on the device begin when all that was written out has been."""
        for layer in self.layers:
            layer.wait_for_writing()

    def check(self) -> None:
        """Refuse results of a step for which the host had too little memory.

        Raises:
            MemoryError: It had.
        """
        if any(layer.failed for layer in self.layers):
            raise MemoryError("attention on the host has too little memory for its parts")


def _zeros(nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


def _why_in_torch() -> str | None:
    """Return why the host attends in torch; None where it does so by its kernel.

    Raises:
        GraphoptError: It has no kernel, and the user has not allowed torch in its place.
    """
    try:
        host_kernel()
    except NoHostKernel as problem:
        if os.environ.get(IN_TORCH) != "torch":
            raise GraphoptError(
                f"{problem}.", f"Or set {IN_TORCH}=torch: attention in torch, much slower."
            ) from problem
        warn_of_torch(str(problem))
        return str(problem)
    return None


def _runner(device: torch.device, refused: str | None) -> Callable[[Job, HostLayer], None]:
    """Return what runs a job of the host's kernel, or does in torch what the kernel would do."""

    def by_kernel(job: Job, layer: HostLayer) -> None:
        run_job(job, device)

    def by_torch(job: Job, layer: HostLayer) -> None:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        run_in_torch(job, layer)

    return by_kernel if refused is None else by_torch


def _pinned_for(device: torch.device) -> Callable[[tuple[int, ...], torch.dtype], Tensor]:
    """Return what makes a little host memory of zeros that copies of a device go by."""

    def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = torch.zeros(shape, dtype=dtype)
        return memory.pin_memory() if device.type == "cuda" else memory

    return pinned
