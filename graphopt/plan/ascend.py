"""Tiles of the Ascend kernels, runtime/kernels/ascend_prefill.py and ascend_decode.py.

The kernels' Triton is compiled by triton-ascend and bishengir-compile, which place every buffer.
What that takes is modelled here, buffer by buffer, so that a plan says beforehand whether it
fits; `tools/check_ascend.py` holds the model to the compiler's own report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from graphopt.plan.base import (
    BYTES,
    Inequality,
    Planner,
    power_above,
)
from graphopt.plan.spec import AttentionSpec
from graphopt.runtime.dispatch import DECODE_TOKENS
from graphopt.runtime.tiling_mask import table_bytes
from graphopt.targets import Target

_FP32 = 4


class AscendPlanner(Planner):
    """Scores and sums pass between a cube core and the two vector cores beside it."""

    kernel: ClassVar[str] = "ascend-triton"

    def limits(self, spec: AttentionSpec, target: Target) -> str | None:
        for name in ("chunk", "alibi", "bias", "varlen"):
            if getattr(spec, name):
                return f"it does not do {name}"
        if spec.kv != "contiguous":
            return f"its tiles are read by one stride, not from a {spec.kv} cache"
        return None

    def candidates(self, spec: AttentionSpec, target: Target) -> Sequence[dict[str, int]]:
        rows, longest = [256, 128, 64, 32], 1024
        splits: list[dict[str, int]] = [{}]
        if spec.phase == "decode":
            # Rows are the heads of a group, of as many tokens as a step may have; most steps
            # have one, and leave a taller tile nothing but less room for keys. A span of keys is
            # a round at least, so that short rounds let few keys fill many cores.
            most = max(power_above(spec.group), min(128, power_above(DECODE_TOKENS * spec.group)))
            rows, longest = [m for m in (*rows, 16) if m <= most], 512
            splits = [{"SPLITS": 64}, {"SPLITS": 32}, {"SPLITS": 16}]
        found = [
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_KV": n * blocks, **split}
            for m, n, blocks, split in product(rows, (512, 256, 128, 64, 32), (4, 2, 1), splits)
            if n * blocks <= longest
        ]

        wide = target.limit("mixed_alignment_bytes")

        def worth(tiles: dict[str, int]) -> tuple[float, bool, int, int]:
            # Rows and keys over their sum: how often what was read is used; the more keys a
            # round has, the fewer times the cube and the vector cores wait for one another. Rows
            # that pass between them go in pieces of 512 bytes.
            m, n, keys = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_KV"]
            whole = n * _FP32 % wide == 0
            return (m * keys / (m + keys), whole, n, tiles.get("SPLITS", 0))

        return [self.complete(spec, tiles) for tiles in sorted(found, key=worth, reverse=True)]

    @staticmethod
    def complete(spec: AttentionSpec, tiles: dict[str, int]) -> dict[str, int]:
        """Return the tiles with those that follow: of the heads, and the side of the mask table.

        Heads are padded to a power of two rather than split in two: a second product, with a
        second tile of sums, costs the unified buffer more than the padding. In decode also SPAN,
        the keys from which on they are split: a round.
        """
        span = {"SPAN": tiles["BLOCK_KV"]} if spec.phase == "decode" else {}
        return {
            **tiles,
            **span,
            "HEAD_TILE": power_above(spec.head_dim),
            "VALUE_TILE": power_above(spec.values),
            "M": max(tiles["BLOCK_M"], tiles["BLOCK_N"]),
        }

    def inequalities(
        self, spec: AttentionSpec, target: Target, tiles: dict[str, int]
    ) -> list[Inequality]:
        m, n, d, v = (tiles[name] for name in ("BLOCK_M", "BLOCK_N", "HEAD_TILE", "VALUE_TILE"))
        size, depth = BYTES[spec.dtype], min(unit.k for unit in target.matrix_units)
        buffer = unified_buffer(spec, tiles)
        align = target.limit("vector_alignment_bytes")
        found = [
            (
                "unified buffer",
                buffer.formula + "; live at once on a vector core",
                buffer.live,
                target.memory_bytes("UB"),
                "bytes",
                "memory.UB",
            ),
            (
                "L0C",
                f"max(BLOCK_M BLOCK_N, BLOCK_M VALUE_TILE) {_FP32}, one product",
                m * max(n, v) * _FP32,
                target.memory_bytes("L0C"),
                "bytes",
                "memory.L0C",
            ),
            (
                "L1",
                # Keys make room for the values; the weights come in by two slots, so that the
                # vector cores write one while the cube reads the other.
                f"(BLOCK_M HEAD_TILE + max(BLOCK_N HEAD_TILE, 2 BLOCK_M BLOCK_N + "
                f"BLOCK_N VALUE_TILE)) {size}",
                (m * d + max(n * d, 2 * m * n + n * v)) * size,
                target.memory_bytes("L1"),
                "bytes",
                "memory.L1",
            ),
            (
                "L0A",
                f"2 BLOCK_M {depth} {size}, two slots of one step of the cube",
                2 * m * depth * size,
                target.memory_bytes("L0A"),
                "bytes",
                "memory.L0A",
            ),
            (
                "L0B",
                f"2 max(BLOCK_N, VALUE_TILE) {depth} {size}, two slots of one step of the cube",
                2 * max(n, v) * depth * size,
                target.memory_bytes("L0B"),
                "bytes",
                "memory.L0B",
            ),
            (
                "alignment",
                f"what the rows of HEAD_TILE, VALUE_TILE and BLOCK_N leave over {align} bytes",
                max(width * size % align for width in (d, v, n)),
                0,
                "bytes",
                "limits.vector_alignment_bytes",
            ),
            (
                "mask table",
                "max(BLOCK_M, BLOCK_N), half a side at least",
                max(m, n),
                tiles["M"],
                "rows",
                "FastAttention, arXiv 2410.16663, tiling-mask",
            ),
            (
                "mask table's bytes",
                "(2 M)^2 2 heads of a token in one tile, an eighth of the cache at most",
                table_bytes(tiles["M"], heads=spec.group if spec.phase == "decode" else 1),
                target.memory_bytes("L2") // 8,
                "bytes",
                "memory.L2",
            ),
        ]
        if spec.phase == "decode":
            merge = merge_buffer(tiles)
            found += [
                (
                    "group",
                    "query heads of a key head, all in one tile",
                    spec.group,
                    m,
                    "rows",
                    "tiles.BLOCK_M",
                ),
                (
                    "unified buffer of the merge",
                    merge.formula + "; live at once on a vector core",
                    merge.live,
                    target.memory_bytes("UB"),
                    "bytes",
                    "memory.UB",
                ),
            ]
        return [Inequality(*row) for row in found]


@dataclass(frozen=True)
class UnifiedBuffer:
    """What the buffers of one vector core take, in bytes.

    Attributes:
        live: Those that live at once where the most do. More than there is, and the compiler
            gives up. The figure it then reports is this one, or more where its placing leaves
            holes (by up to two fifths seen).
        spread: All of them side by side. The compiler gives no two the same place while there
            is room.
        formula: How `live` comes about.
    """

    live: int
    spread: int
    formula: str

    def reported(self, capacity: int) -> int:
        """Return the figure that the compiler's memory report should come near.

        Where all do not lie side by side, the compiler shares places, first as freely as its
        pipelines allow, which ends anywhere from two thirds of the memory up, then, with much
        more to place, only as far as needed, which leaves the memory all but full. The figures
        for these are in the middle: four fifths is within a fifth of either end.
        """
        if self.live > capacity:
            return self.live
        if self.spread > capacity * 13 // 10:
            return capacity * 15 // 16
        return min(self.spread, capacity * 4 // 5)


def unified_buffer(spec: AttentionSpec, tiles: dict[str, int]) -> UnifiedBuffer:
    """Return what bishengir-compile (ascendnpu-ir 1.2.0) places in a vector core's buffer.

    Each of the two vector cores takes half the rows. Tiles of fp32 are counted: `scores` of a
    small block, half BLOCK_M by BLOCK_N, and `sums`, half BLOCK_M by VALUE_TILE. Everything else
    is of one row or one column and comes to a few bytes a row.
    """
    rows = tiles["BLOCK_M"] // 2
    scores = rows * tiles["BLOCK_N"] * _FP32
    sums = rows * tiles["VALUE_TILE"] * _FP32
    blocks = tiles["BLOCK_KV"] // tiles["BLOCK_N"]
    # Tables looked up at an edge: of the diagonal and of the window's lower edge.
    tables = int(spec.causal) + int(spec.window is not None)

    # At an edge: the scores, and what is added to them. A window of the table comes in as fp16,
    # half a tile, and is widened, one tile; the weights are 16 bits wide, half a tile.
    edge = 5 * scores // 2 if tables else 3 * scores // 2
    # In a round: the scores of all its small blocks wait for their one maximum, then one at a
    # time becomes weights. With a window and a soft-cap the compiler keeps the capped scores apart.
    inside = (2 * blocks + (2 if spec.window and spec.softcap else 1)) * scores // 2
    if not tables and not spec.padding_mask:
        # No loop adds a whole tile from elsewhere: the compiler halves all of them by rows.
        inside //= 2
    # At the end of a round: the products come in and the factors of the rows are spread over a
    # tile, beside the sums that stay through all of it.
    live = sums + max(2 * sums, edge, inside) + 16 * rows
    where = {
        2 * sums: "2 sums at the end of a round",
        edge: f"{edge / scores:g} scores at an edge",
        inside: f"{inside / scores:g} scores in a round",
    }
    formula = (
        f"sums + {where[max(where)]} + 16 rows; rows = BLOCK_M / 2, sums = {_FP32} rows "
        f"VALUE_TILE, scores = {_FP32} rows BLOCK_N"
    )

    # Side by side, over the loops: the edges, whole rounds, small blocks left over. A loop has
    # products and spread factors at its end; sums and results come once.
    edges = 1 + int(spec.window is not None)
    left_over = int(blocks > 1)
    score_blocks = edges + blocks + left_over
    spread = sums * (2 * (edges + 1 + left_over) + 2)
    # Scores, and the weights of 16 bits; a window of the table, widened. In whole rounds and what
    # they leave, weights mostly take the place of scores.
    spread += scores * edges * 3 // 2 + scores * edges * tables
    spread += scores * left_over + scores * blocks * 9 // 8
    if spec.softcap:
        spread += scores * score_blocks * 5 // 8
    if spec.padding_mask:
        spread += scores * score_blocks // 8
    # A maximum and a sum along each row fold it in half, the first fold into a place of its own,
    # until it is as long as a vector; those of halved loops are half as long.
    fold = tiles["BLOCK_N"] // 2 if tiles["BLOCK_N"] > 64 else 8
    spread += 2 * rows * fold * _FP32 * score_blocks * 3 // 4
    # Some ten vectors of a number a row, and what little is left.
    spread += 10 * rows * _FP32 + 1536
    return UnifiedBuffer(live, spread, formula)


def merge_buffer(tiles: dict[str, int]) -> UnifiedBuffer:
    """Return the same for the merge of a decode's spans: a program has those of one row."""
    parts = tiles["SPLITS"] * tiles["VALUE_TILE"] * _FP32
    # The parts as they come in, in two slots while there is room, and as they are weighted. The
    # log-sum-exps are read with a stride: the compiler gives each 32 bytes.
    live = 2 * parts + 32 * tiles["SPLITS"]
    spread = 3 * parts + 160 * tiles["SPLITS"] + 1536
    return UnifiedBuffer(live, spread, f"2 SPLITS VALUE_TILE {_FP32} + 32 SPLITS")


def rounds(keys: int, tiles: dict[str, int]) -> int:
    """Return how often, over `keys` that a block of rows sees, sums are rescaled and handed over.

    It falls with BLOCK_KV over BLOCK_N: what the larger block of the two-level tiling is for.
    """
    return -(-keys // tiles["BLOCK_KV"])
