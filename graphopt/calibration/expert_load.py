"""How evenly tokens are spread over the routed experts of a carved program."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.execute.block_runner import calibration_runner
from graphopt.execute.hidden_states import HiddenStateStream
from graphopt.ir.feed_forward import routed_gates
from graphopt.ir.graph import Program


def expert_loads(
    program: Program, windows: Tensor, device: torch.device
) -> list[tuple[str, list[float]]]:
    """Return the share of tokens that run each expert, of every feed-forward part with experts.

    Args:
        windows: int64 [N, S].

    Returns:
        For each part its block's name, and for each of its experts a share from 0 to 1.
    """
    stream = HiddenStateStream(calibration_runner(program, device), windows)
    loads: list[tuple[str, list[float]]] = []
    for block in stream:
        choices = [node.output for node in routed_gates(block.function)]
        if not choices:
            continue
        counts: list[Tensor] = []

        def count(batch: int, gates: Tensor, counts: list[Tensor] = counts) -> None:
            counts.append((gates != 0).flatten(0, -2).double().sum(0))

        block.advance(observers=dict.fromkeys(choices, count))
        total = stream.ranks.total(torch.stack(counts).sum(0))
        loads.append((block.name, (total / windows.numel()).tolist()))
    return loads
