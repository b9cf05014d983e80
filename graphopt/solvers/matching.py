"""Pairing rows with columns, one to one, so that what they have in common is large."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_pairs(gain_NN: Tensor) -> Tensor:
    """Return the column that each row is paired with, the pairs of largest gain first.

    Pairs of which each is the other's best among those that are left are made at once, which is
    what taking the largest gain of all again and again comes to. The sum is at least half of the
    largest one; the exact assignment takes minutes for some thousand neurons.

    Args:
        gain_NN: fp [N, N].

    Returns:
        int64 [N] on the device of the gains: a permutation.
    """
    count = len(gain_NN)
    pairs = torch.full((count,), -1, device=gain_NN.device)
    rows = torch.arange(count, device=gain_NN.device)
    columns = rows.clone()
    while len(rows):
        gain = gain_NN[rows[:, None], columns]
        best = gain.argmax(1)
        mutual = gain.argmax(0)[best] == torch.arange(len(rows), device=rows.device)
        if not bool(mutual.any()):
            # Equal gains can stand in a ring; one pair of the largest breaks it.
            first = int(gain.amax(1).argmax())
            mutual[first] = True
        pairs[rows[mutual]] = columns[best[mutual]]
        left = torch.ones(len(columns), dtype=torch.bool, device=rows.device)
        left[best[mutual]] = False
        rows, columns = rows[~mutual], columns[left]
    return pairs
