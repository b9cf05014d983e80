"""Greedy decoding in caches of fixed room, some of which lie in the host's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from graphopt.ir.kv_host import HostShare, prefill_chunk
from graphopt.runtime.decoder import Decoder
from graphopt.runtime.host_kv import HostKV
from graphopt.runtime.host_parts import LayerShape
from graphopt.runtime.kv_cache import fixed_caches


class HostDecoder(Decoder):
    """A `Decoder` of a model whose `kv_hosts` say which layers have keys in host memory.

    A prompt is read in parts. A step is recorded as one CUDA graph, in which the host's kernel is a
    node; one for each number of pieces that the texts fill.

    Attributes:
        kv: Keys and values in host memory, with what a step moved.
        piece: Tokens of a piece; None for what suits the capacity.
        chunk: Tokens of each row of a prompt that are read at once; None for `prefill_chunk`.

    Raises:
        ValueError: As for `Decoder`; or more tokens or texts than keys were placed for.
        GraphoptError: The host has too little memory, with how much is needed, or no compiler.
    """

    piece: ClassVar[int | None] = None
    chunk: ClassVar[int | None] = None

    def _caches(self, empty: Sequence[tuple[Tensor, Tensor]]) -> list[Any]:
        model = self.model
        bits = model.kv_bits or [16] * len(empty)
        placed = [number for number, share in enumerate(model.kv_hosts) if share is not None]
        shares = [HostShare(*model.kv_hosts[number]) for number in placed]
        shapes = []
        for number in placed:
            k, v = empty[number]
            shapes.append(LayerShape(k.shape[1], k.shape[3], v.shape[3], k.dtype, bits[number]))
        self.kv = HostKV(shares, shapes, self.capacity, self.seq_lens, piece=self.piece)
        rest = [number for number in range(len(empty)) if number not in placed]
        made = fixed_caches(
            [empty[number] for number in rest],
            [model.kv_layouts[number] for number in rest],
            self.capacity, self.seq_lens, self.new_lens, [bits[number] for number in rest],
        )  # fmt: skip
        caches: dict[int, Any] = {**dict(zip(placed, self.kv.layers, strict=True))}
        caches |= dict(zip(rest, made, strict=True))
        return [caches[number] for number in range(len(empty))]

    def _read(self, texts: list[list[int]]) -> None:
        chunk = self.chunk or prefill_chunk(self.batch)
        for start in range(0, max(map(len, texts)), chunk):
            part = [text[start : start + chunk] for text in texts]
            ended = [row for row, tokens in enumerate(part) if not tokens]
            kept = [(x, x[ended].clone()) for x in (self.logits, self.token) if x is not None]
            self.kv.begin_step(self.held, decoding=False)
            super()._read(part)
            for now, before in kept if ended else ():
                now[ended] = before
        # A step that was recorded before does not wait by itself.
        self.kv.wait_for_writing()

    def _advance(self) -> None:
        self.kv.begin_step([count - 1 for count in self.held], decoding=True)
        super()._advance()

    def _check(self) -> None:
        self.kv.check()

    def _records(self) -> bool:
        return super()._records() and self.kv.records

    def _turn(self) -> int:
        return -(-(self.used - 1) // self.kv.granule)
