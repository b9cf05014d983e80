"""Work of the host between kernels of a device, and pieces of keys on their way to it."""

from __future__ import annotations

import ctypes
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.kv_memory import unpack_rows
from graphopt.runtime.copies import Copies
from graphopt.runtime.driver import check_status, cuda_driver
from graphopt.runtime.host_attention import Job, host_kernel


def run_job(job: Job, device: torch.device) -> None:
    """Run a job of the C++ kernel: at once, or behind what a device's current stream has to do.

    A stream calls the library without Python, from a thread of the driver, so that a CUDA graph may
    hold the call. The job has to live as long as the stream or graph needs it.

    Raises:
        DriverError: The driver does not take it.
        MemoryError: It ran at once, and there was no memory for its parts.
    """
    kernel = host_kernel()
    if device.type != "cuda":
        kernel.graphopt_host_step(ctypes.byref(job))
        if job.failed:
            raise MemoryError("attention on the host has too little memory for its parts")
        return
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    function = ctypes.cast(kernel.graphopt_host_step, ctypes.c_void_p)
    check_status(
        cuda_driver().cuLaunchHostFunc(stream, function, ctypes.c_void_p(ctypes.addressof(job))),
        "cannot start attention on the host",
    )


def run_in_torch(job: Job, layer: Any) -> None:
    """Do what the C++ kernel does, in torch.

    Args:
        layer: The `HostLayer` whose keys the job is for.
    """
    box = layer.mailbox
    bits, width, dim = layer.shape.bits, layer.shape.width, box.q.shape[3]
    slots = box.lens.long() - job.first
    if not job.append_only:
        whole = (
            x.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, job.begin :] for x in (layer.k, layer.v)
        )
        k, v = whole
        if bits < 16:
            k, v = (unpack_rows(x, d, bits, box.q.dtype) for x, d in ((k, dim), (v, width)))
        options = {"scale": job.scale, "causal": False, "softcap": job.softcap or None}
        lens = (slots - job.begin).clamp(min=0, max=k.shape[2])
        out = functional.attention(box.q, k, v, kv_lens=lens, **options)
        lse, _ = functional.attention_statistics(box.q, k, kv_lens=lens, **options)
        box.result.copy_(torch.cat((out.float().flatten(), lse.float().flatten())))
    for row, slot in enumerate(slots.tolist()):
        if 0 <= slot < job.slots:
            number, place = divmod(slot, job.piece)
            layer.k[number, row, :, place] = box.k[row, :, 0]
            layer.v[number, row, :, place] = box.v[row, :, 0]


class HasPieces(Protocol):
    """A layer whose pieces are copied to a device."""

    def piece(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a piece, [B, G, piece, D] and [B, G, piece, Dv]."""


class PieceStream:
    """Pieces of the layers of a step on their way to a device, through two buffers.

    As soon as what reads a buffer has been asked for, the next piece of the step is copied into it,
    of whichever layer it is: while other layers compute, the first pieces of the next one come.

    Args:
        copies: What runs the copies.
        nbytes: Of the largest piece, keys and values.
    """

    def __init__(self, copies: Copies, nbytes: int, device: torch.device) -> None:
        self._copies = copies
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._coming: deque[tuple[HasPieces, int]] = deque()
        self._there: deque[tuple[HasPieces, int, int, Any]] = deque()
        self.bytes_moved = 0

    def begin(self, pieces: Sequence[tuple[HasPieces, int]]) -> None:
        """Begin to bring the pieces that a step reads, in the order in which it reads them."""
        self._coming, self._there = deque(pieces), deque()
        for buffer in range(2):
            self._bring(buffer)

    def take(self, layer: HasPieces, number: int, read: Callable[[Tensor, Tensor], Any]) -> Any:
        """Return what `read` makes of a piece's keys and values, when they are there.

        Raises:
            RuntimeError: It is not the next one of the step.
        """
        if not self._there or self._there[0][0] is not layer or self._there[0][1] != number:
            raise RuntimeError(
                "layers attend in another order than their caches: run the model by its Decoder"
            )
        _, _, buffer, copied = self._there.popleft()
        self._copies.wait(copied)
        result = read(*self._views(layer, number, buffer))
        self._bring(buffer)
        return result

    def _bring(self, buffer: int) -> None:
        if not self._coming:
            return
        layer, number = self._coming.popleft()
        views = self._views(layer, number, buffer)

        def copy() -> None:
            for there, host in zip(views, layer.piece(number), strict=True):
                there.copy_(host, non_blocking=True)

        self._there.append((layer, number, buffer, self._copies.start(copy)))
        self.bytes_moved += sum(view.nbytes for view in views)

    def _views(self, layer: HasPieces, number: int, buffer: int) -> tuple[Tensor, Tensor]:
        k, v = layer.piece(number)
        memory = self._buffers[buffer]
        return (
            memory[: k.nbytes].view(k.dtype).view(k.shape),
            memory[k.nbytes : k.nbytes + v.nbytes].view(v.dtype).view(v.shape),
        )


def merge(
    parts: Sequence[tuple[Tensor, Tensor]], sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return attention over all keys from that over parts of them, and its log-sum-exp.

    Args:
        parts: Of each the output [B, H, S, Dv] and the log-sum-exp [B, H, S], -inf where a query
            sees none of its keys.
        sinks: [H], one more logit per head that carries no value, of none of the parts.

    Returns:
        fp32 [B, H, S, Dv] and [B, H, S]; 0 and -inf where nothing is seen.
    """
    if len(parts) == 1 and sinks is None:
        return parts[0][0].float(), parts[0][1].float()
    lse = torch.stack([each.float() for _, each in parts])
    top = lse.amax(0)
    sink = None if sinks is None else sinks.float()[None, :, None].expand_as(top)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(lse - top)
    total = weights.sum(0)
    if sink is not None:
        total = total + torch.exp(sink - top)
    shares = weights / total.masked_fill(total == 0, 1.0)
    if parts[0][0].shape[2] > 1:
        # Of many tokens outputs are large: one after the other.
        out = torch.zeros_like(parts[0][0], dtype=torch.float32)
        for (part, _), share in zip(parts, shares, strict=True):
            out = torch.addcmul(out, part.float(), share[..., None])
        return out, top + torch.log(total)
    sums = []
    for dtype in dict.fromkeys(part.dtype for part, _ in parts):
        index = [number for number, (part, _) in enumerate(parts) if part.dtype == dtype]
        alike = torch.stack([parts[number][0] for number in index])
        own = shares if len(index) == len(parts) else torch.stack([shares[n] for n in index])
        sums.append((alike.float() * own[..., None]).sum(0))
    return sum(sums[1:], start=sums[0]), top + torch.log(total)


def warn_of_torch(reason: str) -> None:
    """Say loudly that torch attends on the host, as the user allowed."""
    warnings.warn(
        f"ATTENTION ON THE HOST RUNS IN TORCH, several times slower: {reason}", stacklevel=3
    )
