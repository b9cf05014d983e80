"""Tiles of the Volta kernels in CUDA C++: `attention_prefill` and `attention_decode`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

from graphopt.plan.base import Inequality, Planner, power_above
from graphopt.plan.spec import AttentionSpec
from graphopt.runtime.volta import shared_bytes
from graphopt.targets import Target

# Registers a thread has beside its tiles: addresses, maxima, sums, fragments in flight. With it,
# tiles that satisfy the inequality below were compiled by ptxas 12.9 without a spill, for every
# head size and every form that tests/lowering/test_volta.py compiles. It is cautious: some that
# do not satisfy it do not spill either.
_OVERHEAD = 83

# Pieces of 16 bytes a thread may carry: no tile gives it more.
_ALL = 16

# Cycles of one sub-core's matrix unit for one product of a warp: four steps of two cycles, 8.4
# measured on a V100. Its four sub-cores share one path to shared memory of 128 bytes a cycle.
_PRODUCT_CYCLES = 8
_SUB_CORES = 4


class VoltaPlanner(Planner):
    """Warps of 16 or 32 rows; each multiplies 16 by 16 with every pair of quadpairs."""

    kernel: ClassVar[str] = "volta-cuda"

    def refuses(self, spec: AttentionSpec, target: Target) -> str | None:
        if spec.dtype == "bf16":
            return "no native bf16; the model is converted to f16 with a range report"
        return super().refuses(spec, target)

    def limits(self, spec: AttentionSpec, target: Target) -> str | None:
        if spec.selected_blocks:
            return "it reads all pages of a cache, not a list of them"
        if spec.page_max:
            return "it gives no page maxima"
        return None

    def candidates(self, spec: AttentionSpec, target: Target) -> Sequence[dict[str, int]]:
        if spec.phase == "decode":
            # A warp's tiles are its own, and all rows share every key that is read.
            most = 32 if spec.group > 16 else 16
            found = [
                {"BLOCK_M": m, "BLOCK_N": n, "WARPS": warps, "CARRY": carry, "P_PATH": path}
                for m, n, warps, carry, path in itertools.product(
                    (16, 32), (32, 16), (4, 2), (_ALL, 4, 2, 1), (0, 1)
                )
                if m <= most
            ]
            found = [self._decode(spec, target, tiles) for tiles in found]
        else:
            found = [
                {"BLOCK_M": rows * warps, "BLOCK_N": n, "WARPS": warps, "CARRY": _ALL, "P_PATH": p}
                for rows, warps, n, p in itertools.product((32, 16), (8, 4), (64, 32, 16), (0, 1))
            ]

        def worth(tiles: dict[str, int]) -> tuple[int, ...]:
            # Two warps a sub-core hide each other's latencies.
            warps = min(self.resident_warps(spec, target, tiles), 2 * _SUB_CORES)
            if spec.phase == "decode":
                # It waits for memory: the more is asked for at once, the better.
                return (-warps, -tiles["CARRY"], -tiles["BLOCK_M"], -tiles["BLOCK_N"])
            return (-warps, self.cycles(spec, tiles), tiles["BLOCK_M"], tiles["P_PATH"])

        return sorted(found, key=worth)

    @staticmethod
    def _decode(spec: AttentionSpec, target: Target, tiles: dict[str, int]) -> dict[str, int]:
        # Two blocks a core, however many key heads there are: with one sequence the whole
        # machine reads, and a longer batch changes no row's result.
        blocks = 2 * (target.cores or 1) // spec.kv_heads
        splits = 1 << max(blocks.bit_length() - 1, 0) if blocks else 1
        span = 2 * tiles["WARPS"] * tiles["BLOCK_N"]
        return {**tiles, "SPLITS": min(max(splits, 1), 128), "SPAN": span}

    @staticmethod
    def cycles(spec: AttentionSpec, tiles: dict[str, int]) -> int:
        """Return prefill's cycles of a sub-core for 16 by 16 scores, by the busier unit.

        The matrix unit has 2 D / 8 + 4 Dv / 16 products. The path to shared memory has, in
        wavefronts of 128 bytes: operands of 16 bytes a lane of Q and K, each read once for all
        tiles of the other; of 8 bytes a lane of V; the weights, by 6 shuffles, or 4 stores and
        2 loads of 4; and the tile's way in.
        """
        rows = _rows(spec, tiles) // 16
        columns = tiles["BLOCK_N"] // 16
        keys, values = spec.head_dim // 8, -(-spec.values // 16)
        products = 2 * keys + 4 * values
        weights = 12 if tiles["P_PATH"] else 6
        wavefronts = 4 * keys * (rows + columns) / (rows * columns) + 8 * values / rows + weights
        wavefronts += 2 * (keys + 2 * values) / (rows * tiles["WARPS"])
        return round(max(_PRODUCT_CYCLES * products, _SUB_CORES * wavefronts))

    @staticmethod
    def registers(spec: AttentionSpec, tiles: dict[str, int]) -> int:
        """Return about how many registers a thread needs, from above."""
        rows = _rows(spec, tiles) // 16
        decode = spec.phase == "decode"
        loaders = 32 * (1 if decode else tiles["WARPS"])
        keys, values = spec.head_dim // 8, -(-spec.values // 16) * 2
        carried = 0
        for chunks in (keys, values):
            each = -(-tiles["BLOCK_N"] * power_above(chunks) // loaders)
            # Decode's warps have many pieces each, and addresses for them.
            carried = max(carried, min(each, tiles["CARRY"]) * (8 if decode else 4))
        sums = 4 * rows * values
        # Wide tiles have more fragments on their way as well.
        scores = 8 * rows * tiles["BLOCK_N"] // 16 + 13 * (tiles["BLOCK_N"] // 64)
        extras = rows * (
            15 * spec.bias
            + 2 * (spec.alibi + spec.padding_mask + bool(spec.softcap) + bool(spec.chunk))
            + (spec.kv != "contiguous")
            + bool(spec.window)
        )
        return sums + scores + carried + extras + _OVERHEAD

    def resident_warps(self, spec: AttentionSpec, target: Target, tiles: dict[str, int]) -> int:
        """Return how many warps of these tiles a core holds at once."""
        shared, registers = target.memory_bytes("shared"), target.memory_bytes("registers")
        threads = tiles["WARPS"] * target.limit("warp")
        blocks = min(
            shared // self.shared(spec, tiles),
            registers // 4 // (threads * self.registers(spec, tiles)),
        )
        return blocks * tiles["WARPS"]

    @staticmethod
    def shared(spec: AttentionSpec, tiles: dict[str, int]) -> int:
        """Return the bytes of shared memory of a block: exactly what the launcher asks for."""
        return shared_bytes(
            {
                "DECODE": spec.phase == "decode",
                "HEAD_DIM": spec.head_dim,
                "VALUE_DIM": spec.values,
                **tiles,
            }
        )

    def inequalities(
        self, spec: AttentionSpec, target: Target, tiles: dict[str, int]
    ) -> list[Inequality]:
        if spec.phase == "decode":
            formula = (
                "2 (BLOCK_M D + WARPS (BLOCK_N (D + Dv) + P_PATH BLOCK_M BLOCK_N)), or at the "
                "end 4 WARPS BLOCK_M (Dv + 6), rows padded against bank conflicts"
            )
        else:
            formula = (
                "2 (BLOCK_M D + BLOCK_N (D + Dv) + P_PATH BLOCK_M BLOCK_N), rows padded against "
                "bank conflicts"
            )
        return [
            Inequality(
                "shared memory",
                formula,
                self.shared(spec, tiles),
                target.limit("shared_bytes_per_block"),
                "bytes",
                "limits.shared_bytes_per_block",
            ),
            Inequality(
                "registers",
                "of the sums R Dv / 32, of the scores R BLOCK_N / 32, of the tile on its way, of "
                f"masks and biases, + {_OVERHEAD}, with R rows a warp",
                self.registers(spec, tiles),
                target.limit("registers_per_thread"),
                "a thread",
                "limits.registers_per_thread",
            ),
            Inequality(
                "threads",
                "WARPS warps",
                tiles["WARPS"] * target.limit("warp"),
                target.limit("threads_per_block"),
                "a block",
                "limits.threads_per_block",
            ),
        ]


def _rows(spec: AttentionSpec, tiles: dict[str, int]) -> int:
    """Return the rows of a warp: decode's warps share them and split the keys."""
    return tiles["BLOCK_M"] if spec.phase == "decode" else tiles["BLOCK_M"] // tiles["WARPS"]
