"""Attention with a window that is much shorter than the text, for GPUs: by blocks of queries.

Models are emitted without it: a cache, or a kernel, sees to windows there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ir.functional import allowed_keys, sdpa

LEAST_BLOCK = 256
"""Queries of a block at least: of fewer, a GPU's kernels for attention are slow."""


def runs_in_blocks(q: Tensor, k: Tensor, window: int) -> bool:
    """Return whether blocks leave out most of what a causal attention computes otherwise.

    torch's kernels compute the scores that a mask lets pass and all others. A CPU's are fewer
    already, as `functional.attention` says.
    """
    return q.is_cuda and q.shape[2] == k.shape[2] >= 2 * max(window, LEAST_BLOCK)


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float) -> Tensor:
    """As `functional.attention`, causal and with a window.

    Of n blocks, 2 n - 1 squares of a block are computed in place of n^2.

    Args:
        q: [B, H, S, D].
        k, v: [B, G, S, D] and [B, G, S, Dv].
        window: Keys that a query sees, its own included; at most S.

    Returns:
        [B, H, S, Dv].
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    S, rows = q.shape[2], max(window, LEAST_BLOCK)
    blocks = -(-S // rows)
    if blocks * rows > S:
        # Keys that fill up the last block are seen by queries that do so alone.
        q, k, v = (F.pad(x, (0, 0, 0, blocks * rows - S)) for x in (q, k, v))
    # [B, blocks, heads, rows, D].
    q, k, v = (x.unflatten(2, (blocks, rows)).transpose(1, 2) for x in (q, k, v))
    seen = None
    if window < rows:
        seen = allowed_keys(rows, None, rows, True, window, None, q.device)
    first = sdpa(q[:, 0], k[:, 0], v[:, 0], seen, is_causal=seen is None, scale=scale)
    if blocks > 1:
        keys, values = (
            # [B * (blocks - 1), heads, 2 rows, D]: a block, and in front of it the one before.
            torch.cat((x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)), 2)
            for x in (k, v)
        )
        seen = allowed_keys(rows, None, 2 * rows, True, window, None, q.device)
        others = sdpa(q[:, 1:].flatten(0, 1), keys, values, seen, is_causal=False, scale=scale)
        others = others.unflatten(0, (-1, blocks - 1)).transpose(1, 2).flatten(2, 3)
        first = torch.cat((first, others), 2)
    return first[:, :, :S]
