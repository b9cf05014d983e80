"""What each rank of a sharded program runs.

A program is sharded where its weights are placed on several devices. Its text is that of every
rank: functions have the sizes of one rank's parts, and collectives say how many ranks there are.
`rank_program` is what one of them runs by itself, with its own part of every weight and state.
"""

from __future__ import annotations

from dataclasses import replace

from graphopt.ir.graph import Program
from graphopt.ir.parts import rank_part
from graphopt.ir.placement import Placement
from graphopt.ir.weight_store import WeightStore
from graphopt.ir.weights import Weight

FIRST_ROWS = "tensor_parallel.first_rows"
"""How the constant is called that tells a rank the first row of its part of a vocabulary."""


def group_of(program: Program) -> tuple[str, ...]:
    """Return the devices of a program's ranks, one each; () for a program on one device."""
    for placement in _placements(program):
        if len(placement.devices) > 1:
            return placement.devices
    return ()


def _placements(program: Program) -> list[Placement]:
    placed = [*program.weights, *program.states.values()]
    return [item.placement for item in placed if item.placement is not None]


def is_sharded(program: Program) -> bool:
    """Return whether a program is one text for several ranks."""
    return bool(group_of(program))


def rank_weight(weight: Weight, rank: int) -> Weight:
    """Return a rank's part of a weight, unread and without a placement.

    Loading it reads no other rank's part of a file, as far as the layout of the file allows.
    """
    return replace(
        weight, producer=rank_part(weight.producer, weight.placement, rank), placement=None
    )


def rank_program(program: Program, rank: int) -> Program:
    """Return what one rank runs: the same functions with its own parts of weights and states.

    Args:
        rank: From 0 on; a place in `group_of(program)`.

    Raises:
        ValueError: There is no such rank.
    """
    devices = group_of(program)
    if not 0 <= rank < len(devices):
        raise ValueError(f"rank {rank} of a program on {len(devices)} ranks")
    own = program.copy()
    own.weights = WeightStore({w.name: rank_weight(w, rank) for w in program.weights})
    own.states = {name: state.of_rank() for name, state in program.states.items()}
    for call in own.calls:
        call.placement = None
    return own
