"""How a model's attention moves over the pages of its keys: what KV policies learn from.

stream = HiddenStateStream(runner, windows)
for trace in attention_traces(stream, page=16):
    trace.probabilities_BGSN  # of one attention, over one batch of windows
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.execute.hidden_states import HiddenStateStream
from graphopt.execute.page_attention import (
    AttentionLayer,
    CausalAttention,
    attention_layers,
)
from graphopt.ir.kv_policies import Filled


@dataclass(frozen=True)
class AttentionTrace:
    """The rows of one attention, dense, over one batch of texts.

    Attributes:
        layer: The attention.
        batch: The number of the batch in the stream.
        first: The token of the first row.
        probabilities_BGSN: Of each token from `first` on the largest attention probability in each
            page of keys, also over the query heads of a KV head; 0 in pages that it does not see.
        lengths: Where the keys of the whole texts lie.
    """

    layer: AttentionLayer
    batch: int
    first: int
    probabilities_BGSN: Tensor
    lengths: Filled


def attention_traces(
    stream: HiddenStateStream, page: int, *, first: int = 0
) -> Iterator[AttentionTrace]:
    """Walk a stream of hidden states behind all blocks, and yield what each attention reads.

    Attentions that cannot read selected pages (`AttentionLayer.left_alone`) have no trace. One
    attention's rows over one batch are in memory at a time, [B, H, S, N] of them twice: give the
    stream as few `tokens_at_once` as that has room for.

    Args:
        stream: In front of the first block.
        page: Keys of a page.
        first: The token of the first row.

    Yields:
        In order of the attentions, and for each in order of the batches.
    """
    layers = [layer for layer in attention_layers(stream.program) if layer.left_alone is None]
    for block in stream:
        for layer in layers:
            if layer.position != block.block.position:
                continue
            wanted = CausalAttention.wanted(layer.node)
            for batch in range(len(stream.ids)):
                with torch.no_grad():
                    values = dict(zip(wanted, block.values(batch, wanted), strict=True))
                    attention = CausalAttention.of_values(layer.node, block.call, values)
                    probabilities = attention.page_scores(first, page).probabilities()
                lengths = Filled.all_of(attention.k_BGSD)
                yield AttentionTrace(layer, batch, first, probabilities, lengths)
