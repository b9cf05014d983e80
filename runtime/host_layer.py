"""Caches whose keys and values lie in pinned host memory, or those behind a text's front.

A step of one token attends to what came before it in parts, whose results are merged by their
log-sum-exp: its own key, which is at hand; the tokens at the front, which lie on the device; pieces
that are copied to the device on a stream of their own; and the other pieces, to which the C++
kernel attends on the host's processors while the device works on the rest. Down to the host go a
query, a key and a value, up comes the output. The kernel also puts the new key and value into host
memory, when it has read what came before: nothing waits for that.

A step of more tokens reads a part of a prompt: it attends to all pieces on the device, since it has
to compute more with each key than it takes to copy it, and its keys and values are written out on
another stream.

Layout letters: B batch, S tokens of a step, G key heads, H query heads, D and Dv head sizes, N
pieces of P tokens, R tokens of a row on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graphopt.ir import functional
from graphopt.ir.kv_host import HostShare
from graphopt.ir.kv_memory import pack_rows, unpack_rows
from graphopt.runtime.attention import Extras, Keys
from graphopt.runtime.host_attention import Job, fill_job
from graphopt.runtime.host_parts import HostStep, LayerShape, Mailbox
from graphopt.runtime.host_step import merge
from graphopt.runtime.kv_cache import AppendKV

Attend = Callable[[Tensor, Keys, Extras, Mapping[str, Any]], tuple[Tensor, Tensor | None, Any]]
"""Attention by kernels or the reference: output, log-sum-exp if asked for, and nothing."""


class HostLayer:
    """Keys and values of one layer, in host memory and on the device.

    Attributes:
        share: How they are divided.
        k, v: [N, B, G, P, row], host memory.
        front: [B, G, R and room for a part of a prompt, row] on the device; None for none.
        seq_lens: int32 [B], on the device: tokens before the step.
    """

    def __init__(
        self,
        step: HostStep,
        share: HostShare,
        shape: LayerShape,
        host: tuple[Tensor, Tensor],
        front: tuple[Tensor, Tensor] | None,
        seq_lens: Tensor,
    ) -> None:
        self._step, self.share, self.shape = step, share, shape
        self.k, self.v = host
        self.front, self.seq_lens = front, seq_lens
        first = torch.arange(len(self.k), dtype=torch.int32, device=seq_lens.device)
        self._firsts = (self.resident + first * self.k.shape[3])[:, None]
        self._mailbox: Mailbox | None = None
        self._jobs: dict[int | None, Job] = {}  # by the first piece that is read
        self._written: list[Any] = []

    @property
    def mailbox(self) -> Mailbox | None:
        """What the host's kernel reads and writes, once a step was asked of it."""
        return self._mailbox

    @property
    def failed(self) -> bool:
        """Whether the host's kernel had no memory for its parts."""
        return any(job.failed for job in self._jobs.values())

    @property
    def resident(self) -> int:
        """Tokens of a row on the device, R."""
        return 0 if self.front is None else min(self.share.resident, self._step.capacity)

    def used_pieces(self, tokens: int) -> int:
        """Return in how many pieces the tokens of a row lie that are not on the device."""
        return min(-(-max(tokens - self.resident, 0) // self.k.shape[3]), len(self.k))

    def streamed(self, step: HostStep) -> range:
        """Return the pieces that a step copies to the device."""
        used = self.used_pieces(step.bound)
        return range(self.share.streamed_pieces(used) if step.decoding else used)

    def piece(self, number: int) -> tuple[Tensor, Tensor]:
        return self.k[number], self.v[number]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        options: Mapping[str, Any],
        attend: Attend,
        append: AppendKV,
    ) -> Tensor:
        """Return attention [B, H, S, Dv] to all tokens so far and the step's own; keep these.

        Args:
            q, k, v: [B, H, S, D], [B, G, S, D], [B, G, S, Dv].
            sinks: [H], see `functional.attention`.
            options: Of the attention: scale, softcap.
        """
        step, plain = (
            self._step,
            {n: options[n] for n in ("scale", "softcap") if n in options},
        )
        new, rows = (k, v), (k, v)
        if self.shape.bits < 16:
            rows = (pack_rows(k, self.shape.bits), pack_rows(v, self.shape.bits))
            sizes = (self.shape.dim, self.shape.width)
            k, v = (
                unpack_rows(row, size, self.shape.bits, v.dtype)
                for row, size in zip(rows, sizes, strict=True)
            )
        before = max(step.held, default=0) > 0 or step.decoding
        if not before:
            self._write(rows)
            self._write_front(new, append)
            return attend(q, Keys(k, v), Extras(sinks=sinks), {**plain, "causal": True})[0]
        streamed = self.streamed(step)
        computed = range(len(streamed), self.used_pieces(step.bound)) if step.decoding else range(0)
        pending = None
        if not step.decoding:
            self._write(rows)
        elif step.bound >= self.resident:
            pending = self._begin(q, rows, computed, plain)
        parts = [_own(q, k, v, plain, attend)]
        lens, size = self.seq_lens.expand(q.shape[0]), self.k.shape[3]
        if self.front is not None:
            front = Keys(*self.front, kv_lens=lens.clamp(max=self.resident))
            parts.append(self._part(q, front, plain, attend))
        # Of all pieces at once: a kernel for each would take as long as the merging.
        of_pieces = (lens - self._firsts[: len(streamed)]).clamp(min=0, max=size)
        for number, here in zip(streamed, of_pieces, strict=True):

            def read(k_there: Tensor, v_there: Tensor, here: Tensor = here) -> Any:
                # A kernel between the copy and what reads it, which may be launched before the end
                # of the one in front of it: that one has waited.
                keys = Keys(k_there, v_there, kv_lens=here.clone())
                return self._part(q, keys, plain, attend)

            parts.append(step.pieces.take(self, number, read))
            if q.shape[2] > 1:
                # Outputs of many tokens are large: they are not kept until all are there.
                parts = [merge(parts)]
        part = None if pending is None else self._end(pending)
        self._write_front(new, append)
        return merge([*parts, *([] if part is None else [part])], sinks)[0].to(q.dtype)

    def _part(
        self, q: Tensor, keys: Keys, plain: Mapping[str, Any], attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """Return attention to keys in front of the step, and its log-sum-exp."""
        if self.shape.bits < 16:
            keys = replace(keys, bits=self.shape.bits, value_dim=self.shape.width)
        out, lse, _ = attend(q, keys, Extras(), {**plain, "causal": False, "lse": True})
        assert lse is not None
        return out, lse

    # --- the host's part of a step of one token ---

    def _begin(
        self, q: Tensor, rows: tuple[Tensor, Tensor], pieces: range, plain: Mapping[str, Any]
    ) -> tuple[Any, tuple[Tensor, ...], bool]:
        """Begin attention to pieces on the host, and the writing of the step's key and value."""
        box = self._box(q)
        key = pieces.start if pieces else None
        if key not in self._jobs:
            self._jobs[key] = self._job(box, pieces, plain)
        lens = self.seq_lens.expand(self._step.batch)
        job, given = self._jobs[key], tuple(x.contiguous() for x in (q, *rows, lens))

        def work() -> None:
            for there, here in zip((box.q, box.k, box.v, box.lens), given, strict=True):
                there.copy_(here, non_blocking=True)
            self._step.run(job, self)
            if pieces:
                box.arrived.copy_(box.result, non_blocking=True)

        # What is copied from is kept until it has been.
        return self._step.beside.start(work), given, bool(pieces)

    def _end(self, pending: tuple[Any, tuple[Tensor, ...], bool]) -> tuple[Tensor, Tensor] | None:
        """Wait, on the device, for the host's part; None if it only wrote."""
        done, given, computed = pending
        self._step.beside.wait(done)
        if not computed:
            return None
        assert self._mailbox is not None
        heads = given[0].shape[1]
        return Mailbox.parts(self._mailbox.arrived, self._step.batch, heads, self.shape.width)

    def _box(self, q: Tensor) -> Mailbox:
        if self._mailbox is None:
            batch, heads, _, dim = q.shape
            k, v, dtype = self.shape.rows()
            pinned = self._step.pinned
            size = batch * heads * (self.shape.width + 1)
            self._mailbox = Mailbox(
                pinned((batch, heads, 1, dim), q.dtype),
                pinned((batch, self.shape.key_heads, 1, k), dtype),
                pinned((batch, self.shape.key_heads, 1, v), dtype),
                pinned((batch,), torch.int32),
                pinned((size,), torch.float32),
                torch.zeros(size, device=q.device),
            )
        return self._mailbox

    def _job(self, box: Mailbox, pieces: range, plain: Mapping[str, Any]) -> Job:
        batch, heads = box.q.shape[:2]
        out, lse = Mailbox.parts(box.result, batch, heads, self.shape.width)
        job = Job()
        fill_job(
            job, box.q, self.k, self.v, box.lens, out, lse, width=self.shape.width,
            first=self.resident, begin=pieces.start * self.k.shape[3], new_k=box.k.data_ptr(),
            new_v=box.v.data_ptr(), scale=plain["scale"], softcap=plain.get("softcap") or 0.0,
            append_only=int(not pieces),
        )  # fmt: skip
        return job

    # --- keys and values of a step that are kept ---

    def _write(self, rows: tuple[Tensor, Tensor]) -> None:
        """Put the keys and values of a part of a prompt into host memory, beside what follows."""
        given = tuple(x.contiguous() for x in rows)
        held, piece, tokens = self._step.held, self.k.shape[3], given[0].shape[2]

        def copy() -> None:
            for row, before in enumerate(held):
                start = max(before, self.resident)
                while start < before + tokens:
                    number, place = divmod(start - self.resident, piece)
                    if number >= len(self.k):
                        break
                    end = min(start - place + piece, before + tokens)
                    for new, host in zip(given, (self.k, self.v), strict=True):
                        for head in range(host.shape[2]):
                            host[number, row, head, place : place + end - start].copy_(
                                new[row, head, start - before : end - before], non_blocking=True
                            )
                    start = end

        self._written.append((self._step.beside.start(copy), given))

    def _write_front(self, new: tuple[Tensor, Tensor], append: AppendKV) -> None:
        if self.front is not None:
            # What lies behind the front comes into its room for a part of a prompt.
            lens = self.seq_lens.clamp(max=self.resident)
            append(*new, *self.front, lens, bits=self.shape.bits)

    def wait_for_writing(self) -> None:
        """Let what follows on the device begin when all that was written has been."""
        for written, _ in self._written:
            self._step.beside.wait(written)
        self._written.clear()


def _own(
    q: Tensor, k: Tensor, v: Tensor, plain: Mapping[str, Any], attend: Attend
) -> tuple[Tensor, Tensor]:
    """Return attention of a step's tokens to each other, and its log-sum-exp."""
    if q.shape[2] > 1:
        out, lse, _ = attend(q, Keys(k, v), Extras(), {**plain, "causal": True, "lse": True})
        assert lse is not None
        return out, lse
    groups = q.shape[1] // k.shape[1]
    k, v = (functional.shared_by_heads(x, groups) for x in (k, v))
    scores = (q.float() * k.float()).sum(-1) * plain["scale"]
    if plain.get("softcap") is not None:
        scores = functional.softcap(scores, plain["softcap"])
    return v, scores
