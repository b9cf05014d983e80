"""The tensors of a checkpoint under their GGUF names, as llama.cpp keeps them.

The reverse of `graphopt.sources.gguf.weights`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.ir.cuts import rows_of, transposed
from graphopt.ir.weights import Producer
from graphopt.lowering.gguf.keys import Unwritable
from graphopt.sources.gguf.architectures import Architecture


@dataclass(frozen=True)
class PlusOne(Producer):
    """A tensor plus one, in fp32: llama.cpp keeps Gemma's gains `1 + weight` whole."""

    source: Producer

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.float32

    def load(self) -> Tensor:
        return self.source.load().float() + 1


def pairs_from_halves(source: Producer, heads: int) -> Producer:
    """Return the rows of each head of halves (0, D/2), ... as pairs (0, 1), (2, 3), ...

    llama.cpp computes Llama's rotary embedding in the interleaved form.
    """
    width = source.shape[0] // heads
    half = width // 2
    order = [
        head * width + pair + half * second
        for head in range(heads)
        for pair in range(half)
        for second in (0, 1)
    ]
    return rows_of(source, tuple(order))


def laid_out(
    tensors: Mapping[str, Producer], architecture: Architecture, config: Any
) -> dict[str, Producer]:
    """Return the tensors of a checkpoint by their GGUF names, in llama.cpp's layout.

    Raises:
        Unwritable: One of them has no name there.
    """
    outer = {module: name for name, module in architecture.outer.items()}
    inner = {module: name for name, module in architecture.inner.items()}
    layer = re.compile(re.escape(architecture.layers) + r"\.(\d+)\.(.+)\.(weight|bias)")
    named: dict[str, Producer] = {}
    for name, producer in tensors.items():
        module, _, suffix = name.rpartition(".")
        value = producer
        if (match := layer.fullmatch(name)) is not None:
            block, module, suffix = match.groups()
            part, prefix = inner.get(module), f"blk.{block}."
            if part in ("attn_q", "attn_k") and architecture.paired_heads:
                heads = (
                    config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
                )
                value = pairs_from_halves(value, heads)
            if suffix == "weight" and module in architecture.transposed:
                value = transposed(value)
        else:
            part, prefix = outer.get(module), ""
        if part is None or not architecture.has(part, suffix):
            raise Unwritable(f"the tensor {name!r} has no name in GGUF files")
        if architecture.gains_plus_one and part.endswith("norm"):
            value = PlusOne(value)
        named[f"{prefix}{part}.{suffix}"] = value
    return named
