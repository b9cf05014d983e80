"""What the kernel for Volta has to have by its constants: products, and loads from shared memory.

`tools/check_volta.py` and the tests count the same in the machine code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.plan.volta_layout import (
    operand_layout,
    operand_load,
    tile_key,
    tile_row,
    value_layout,
    value_load,
    wavefronts,
)


def matrix_instructions(constants: Mapping[str, Any]) -> int:
    """Return how many HMMA.884 one thread has in the body of a tile, all of whose loops unroll.

    A product of a warp, 1024 multiplications, is four. Decode's warps share the rows of a tile
    and have keys of their own; prefill's share out the rows.
    """
    rows = constants["BLOCK_M"] // (1 if constants["DECODE"] else constants["WARPS"])
    width = constants["HEAD_DIM"] + -(-constants["VALUE_DIM"] // 16) * 16
    return int(4 * rows * constants["BLOCK_N"] * width // 1024)


@dataclass(frozen=True)
class Loads:
    """A warp's loads of one operand from shared memory in the body of a tile.

    Attributes:
        width: Bytes a lane.
        count: How many there are.
        wavefronts: Passes over the banks of the worst of them.
    """

    width: int
    count: int
    wavefronts: int

    @property
    def ideal(self) -> int:
        """The fewest passes: 32 lanes' bytes, 128 at a time, some read by two quadpairs."""
        return self.width // 4


def shared_loads(constants: Mapping[str, Any]) -> dict[str, Loads]:
    """Return the loads of `Q`, `K`, `V`, and of the weights `P` where they go through memory."""
    rows = constants["BLOCK_M"] // (1 if constants["DECODE"] else constants["WARPS"]) // 16
    keys = constants["BLOCK_N"] // 16
    head, values = constants["HEAD_DIM"], -(-constants["VALUE_DIM"] // 16) * 16

    def operand(size: int, of: Callable[[int], int], tiles: int) -> Loads:
        layout, steps = operand_layout(size), range(0, 2 * size, 16)
        worst = max(wavefronts(operand_load(layout, of, byte), 16) for byte in steps)
        return Loads(16, len(steps) * tiles, worst)

    columns, layout = range(0, values, 16), value_layout(values)
    found = {
        "Q": operand(head, tile_row, rows),
        "K": operand(head, tile_key, keys),
        "V": Loads(
            8, 4 * keys * len(columns), max(wavefronts(value_load(layout, c), 8) for c in columns)
        ),
    }
    if constants["P_PATH"]:
        found["P"] = operand(constants["BLOCK_N"], tile_row, rows)
    return found
