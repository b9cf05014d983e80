"""How products of quantised weights are cut into tiles: by the figures of a target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class PackedTiles:
    """How a product with a weight of packed codes is cut, for up to so many tokens.

    Attributes:
        tokens: The most tokens for which these are taken; with `unroll`, `columns` or fewer.
        rows, columns: A tile's outputs, and its tokens; powers of two.
        warps: Of a program; 1 with `unroll`.
        programs: How many programs of it a core is given: what is summed over is divided until
            there are as many.
        unroll: Spans of codes that one warp has on their way in registers, 1, 2 or 4; 0: they pass
            through shared memory.
    """

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int
    programs: int
    unroll: int = 0


@dataclass(frozen=True)
class FewTiles:
    """How the kernel in CUDA C++ cuts a product of up to so many tokens.

    Attributes:
        tokens: The most tokens for which these are taken, 16 or fewer.
        warps: About how many a core is given: what is summed over is divided among the warps of a
            block until there are as many.
        row_tiles: Tiles of 16 outputs of a block.
        ahead: Spans of codes that a warp has on their way in registers.
        near: Spans behind these that it brings into the second cache before it waits for what it
            multiplies.
    """

    tokens: int
    warps: int
    row_tiles: int
    ahead: int
    near: int = 0


@dataclass(frozen=True)
class FrontFigures:
    """What it takes a block of the kernel in CUDA C++ to transform what it multiplies.

    Attributes:
        tokens: The most tokens that each block transforms for itself; 0: none, transforms are
            kernels of their own.
        launch: Seconds that one kernel more takes in a step, beside what it computes.
        start: Seconds of a transform's barriers, and until its first product is there.
        product: Seconds in which a core multiplies 16 x 16 by 16 x 8, operands in shared memory.
        feature: Seconds of a feature that a block reads, adds up, and norms or gates.
    """

    tokens: int
    launch: float
    start: float
    product: float
    feature: float


LEAST_WARPS, MOST_WARPS = 4, 16
"""Of a block of the kernel in CUDA C++."""


def warps_for(outputs: int, spans: int, tiles: FewTiles, cores: int) -> int:
    """Return among how many warps, a power of two, a block divides what is summed over.

    Args:
        spans: Into how many pieces that can be divided.
    """
    blocks = -(-outputs // (16 * tiles.row_tiles))
    wanted = round(math.log2(max(1.0, tiles.warps * cores / blocks)))
    divided = 1 << max(0, spans - 1).bit_length()
    return max(LEAST_WARPS, min(MOST_WARPS, 1 << wanted, divided))


@dataclass(frozen=True)
class IntegerTiles:
    """How a product of int8 codes of many tokens is cut.

    Attributes:
        rows, columns, depth: A tile's tokens, its outputs, and what is summed over at a time.
        group: Tiles of tokens that share rows of the weight while those are in the cache.
        persistent: A program a core, which goes from tile to tile, instead of one a tile.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    persistent: bool = False


@dataclass(frozen=True)
class QuantisedTiles:
    """Tiles of the kernels of quantised weights on one target.

    Attributes:
        cores: Of the target.
        shared_bytes: Shared memory that a program may have.
        packed: For 16-bit activations, the fewest tokens first; of more tokens than the last says
            the weight is unpacked as a whole for a dense product.
        integer_packed: The same for codes as activations, multiplied as int8.
        integer: For a weight that was unpacked.
        few: Of the kernel in CUDA C++, the fewest tokens first; of more tokens than the last, or
            where it does not run, `packed` says.
        front: Of transforms in front of that kernel's products; None: they are kernels of their
            own.
    """

    cores: int
    shared_bytes: int
    packed: tuple[PackedTiles, ...]
    integer_packed: tuple[PackedTiles, ...]
    integer: IntegerTiles
    few: tuple[FewTiles, ...] = ()
    front: FrontFigures | None = None


Tiles = TypeVar("Tiles", PackedTiles, FewTiles)


def tiles_for(tokens: int, tiles: tuple[Tiles, ...]) -> Tiles | None:
    """Return the tiles for a number of tokens; None where there are more than the last are for."""
    return next((row for row in tiles if tokens <= row.tokens), None)


def splits_for(outputs: int, tokens: int, spans: int, tiles: PackedTiles, cores: int) -> int:
    """Return among how many programs what a tile sums over is divided.

    Each gets at least two spans, or as many as are on their way at once, and none is left without.

    Args:
        spans: Into how many pieces what is summed over can be divided.
    """
    count = -(-outputs // tiles.rows) * -(-tokens // tiles.columns)
    wanted = max(1, cores * tiles.programs // count)
    step = tiles.unroll or 2
    each = -(-spans // wanted)
    each = max(step, -(-each // step) * step) if tiles.unroll else max(step, each)
    return -(-spans // each)
