"""Tiles of the Triton kernels: `attention_prefill` and `attention_decode`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

from graphopt.plan.base import BYTES, Inequality, Planner, power_above, split_size
from graphopt.plan.spec import AttentionSpec
from graphopt.targets import Target


class TritonPlanner(Planner):
    """Queries stay in registers; keys and values pass through buffers in shared memory."""

    kernel: ClassVar[str] = "triton"

    def limits(self, spec: AttentionSpec, target: Target) -> str | None:
        if spec.page_max and spec.page is not None and spec.page & (spec.page - 1):
            return f"page maxima of pages of {spec.page} tokens: the size must be a power of two"
        return None

    def candidates(self, spec: AttentionSpec, target: Target) -> Sequence[dict[str, int]]:
        warps_of = (4, 8)
        if spec.phase == "decode":
            rows = max(16, power_above(spec.group))
            found = [
                {"BLOCK_M": min(rows, 64), "BLOCK_N": n, "num_warps": 4, "num_stages": stages}
                for n, stages in itertools.product((128, 64, 32, 16), (3, 2, 1))
            ]
            return [self._decode(spec, target, tiles) for tiles in found]
        found = [
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
            for m, n, warps, stages in itertools.product(
                (128, 64, 32, 16), (128, 64, 32, 16), warps_of, (3, 2, 1)
            )
            # A warp of a matrix unit works on 16 rows.
            if m >= 16 * warps or warps == min(warps_of)
        ]

        def worth(tiles: dict[str, int]) -> tuple[float, float, int, int]:
            # How often a warp uses a key it has taken out of shared memory; how often a block
            # uses one it has taken out of device memory; then deeper and wider steps.
            m, n, warps = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["num_warps"]
            return (m / warps, m * n / (m + n), tiles["num_stages"], n)

        return sorted(found, key=worth, reverse=True)

    @staticmethod
    def _decode(spec: AttentionSpec, target: Target, tiles: dict[str, int]) -> dict[str, int]:
        # A program a core, however many key heads there are: with one sequence the whole machine
        # reads, and a longer batch changes no row's result.
        splits = max(1, (target.cores or 1) // spec.kv_heads)
        return {**tiles, "SPLITS": min(splits, 128), "SPAN": 4 * tiles["BLOCK_N"]}

    def inequalities(
        self, spec: AttentionSpec, target: Target, tiles: dict[str, int]
    ) -> list[Inequality]:
        m, n = tiles["BLOCK_M"], tiles["BLOCK_N"]
        threads = tiles["num_warps"] * target.limits["warp"]
        keys, values = sum(split_size(spec.head_dim)), sum(split_size(spec.values))
        size = BYTES[spec.dtype]
        shared = max(tiles["num_stages"] * n * (keys + values) * size, m * keys * size)
        # In 32-bit registers: sums and scores in fp32, weights and queries as matrix operands.
        registers = -(-(m * values + m * n + m * (n + keys) * size // 4) // threads)
        return [
            Inequality(
                "shared memory",
                "max(num_stages BLOCK_N (D + Dv), BLOCK_M D) bytes of an element",
                shared,
                target.limits["shared_bytes_per_block"],
                "bytes",
                "limits.shared_bytes_per_block",
            ),
            Inequality(
                "registers",
                "BLOCK_M (Dv + BLOCK_N + (BLOCK_N + D) / 2) / threads, live at once",
                registers,
                target.limits["registers_per_thread"],
                "a thread",
                "limits.registers_per_thread",
            ),
            Inequality(
                "threads",
                "num_warps warps",
                threads,
                target.limits["threads_per_block"],
                "a block",
                "limits.threads_per_block",
            ),
        ]
