"""Tiles of the Triton kernels: `attention_prefill` and `attention_decode`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

from graphopt.plan.base import BYTES, Inequality, Planner, power_above, split_size
from graphopt.plan.spec import AttentionSpec
from graphopt.runtime.fused import OLDEST
from graphopt.targets import Target

# Shared memory beside the tiles: sums over warps, and what alignment leaves unused.
_OVERHEAD = 1024
# Two for each part of a core: one multiplies while the other works on its exponentials.
_ENOUGH_WARPS = 8


class TritonPlanner(Planner):
    """Queries stay in registers; keys and values pass through buffers in shared memory.

    On a machine with `wgmma`, which needs 64 rows and four warps, tiles are such that Triton takes
    the matrix instructions that Ampere has too. Of the products of `wgmma` the assembler (ptxas
    12.8 to 13.0) keeps the addresses in a register that still holds the start of the shared
    memory, in kernels with as many products as heads of two parts have; results were wrong, or
    memory was read where there is none.
    """

    kernel: ClassVar[str] = "triton"
    reads_codes: ClassVar[bool] = True

    def limits(self, spec: AttentionSpec, target: Target) -> str | None:
        reason = refuses_machine(target)
        if reason is not None:
            return reason
        for size in (spec.head_dim, spec.values):
            if spec.kv_bits < 16 and size & (size - 1):
                return f"a cache of {spec.kv_bits} bits with heads of {size}: no power of two"
        if spec.page_max and spec.page is not None and spec.page & (spec.page - 1):
            return f"page maxima of pages of {spec.page} tokens: the size must be a power of two"
        return None

    def candidates(self, spec: AttentionSpec, target: Target) -> Sequence[dict[str, int]]:
        wide = "wgmma" in target.features
        if spec.phase == "decode":
            rows = min(max(16, power_above(spec.group)), 32 if wide else 64)
            # Few keys are to be divided among many programs: by small blocks, evenly.
            sizes = (64, 32, 16) if spec.selected_blocks else (128, 64, 32, 16)
            found = [
                {"BLOCK_M": rows, "BLOCK_N": n, "num_warps": 4, "num_stages": stages}
                for n, stages in itertools.product(sizes, (3, 2, 1))
            ]
            return [self._decode(spec, target, tiles) for tiles in found]
        rows_of, warps_of = ((64, 32, 16), (2, 4)) if wide else ((128, 64, 32, 16), (4, 8))
        found = [
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
            for m, n, warps, stages in itertools.product(
                rows_of, (128, 64, 32, 16), warps_of, (3, 2, 1)
            )
            # A warp of a matrix unit works on 16 rows.
            if (m >= 16 * warps or warps == min(warps_of)) and not (wide and takes_wgmma(m, warps))
        ]

        def worth(tiles: dict[str, int]) -> tuple[float, ...]:
            # Blocks of two warps have to share a core. How often a warp uses a key it has taken
            # out of shared memory; whether loads run ahead; how often a block uses a key it has
            # taken out of device memory; then deeper and wider steps.
            m, n, warps = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["num_warps"]
            blocks = target.memory_bytes("shared") // shared_bytes(spec, tiles)[0]
            resident = min(blocks * warps, _ENOUGH_WARPS) if wide else 0
            stages = tiles["num_stages"]
            return (resident, m / warps, min(stages, 2), m * n / (m + n), stages, n)

        return sorted(found, key=worth, reverse=True)

    @staticmethod
    def _decode(spec: AttentionSpec, target: Target, tiles: dict[str, int]) -> dict[str, int]:
        # A program a core, however many key heads there are: with one sequence the whole machine
        # reads, and a longer batch changes no row's result.
        programs, blocks = 1, 4
        if spec.selected_blocks:
            # Of a list of pages a program reads little, and while it looks up the first of them
            # and merges its last, another one on the core has keys on their way.
            resident = target.memory_bytes("shared") // shared_bytes(spec, tiles)[0]
            programs, blocks = min(2, max(1, resident)), 2
        splits = max(1, programs * (target.cores or 1) // spec.kv_heads)
        return {**tiles, "SPLITS": min(splits, 128), "SPAN": blocks * tiles["BLOCK_N"]}

    def inequalities(
        self, spec: AttentionSpec, target: Target, tiles: dict[str, int]
    ) -> list[Inequality]:
        m, n = tiles["BLOCK_M"], tiles["BLOCK_N"]
        threads = tiles["num_warps"] * target.limit("warp")
        keys, values = sum(split_size(spec.head_dim)), sum(split_size(spec.values))
        size = BYTES[spec.dtype]
        shared, formula = shared_bytes(spec, tiles)
        # In 32-bit registers: sums and scores in fp32, weights and queries as matrix operands.
        registers = -(-(m * values + m * n + m * (n + keys) * size // 4) // threads)
        return [
            Inequality(
                "shared memory",
                formula,
                shared,
                target.limit("shared_bytes_per_block"),
                "bytes",
                "limits.shared_bytes_per_block",
            ),
            Inequality(
                "registers",
                "BLOCK_M (Dv + BLOCK_N + (BLOCK_N + D) / 2) / threads, live at once",
                registers,
                target.limit("registers_per_thread"),
                "a thread",
                "limits.registers_per_thread",
            ),
            Inequality(
                "threads",
                "num_warps warps",
                threads,
                target.limit("threads_per_block"),
                "a block",
                "limits.threads_per_block",
            ),
        ]


def refuses_machine(target: Target) -> str | None:
    """Return why Triton compiles nothing for a machine; None where it does."""
    capability = target.compute_capability
    if capability is not None and capability >= OLDEST:
        return None
    oldest = "sm_{}{}".format(*OLDEST)
    return f"Triton compiles for GPUs from {oldest} on, and {target.title} is {target.isa}"


def takes_wgmma(rows: int, warps: int) -> bool:
    """Return whether Triton multiplies a tile by `wgmma`, where the machine has it."""
    return rows % 64 == 0 and warps % 4 == 0


def shared_bytes(spec: AttentionSpec, tiles: dict[str, int]) -> tuple[int, str]:
    """Return the shared memory that Triton allocates at most, in bytes, and the formula.

    Whatever a loop loads for a product, directly or through the scores, waits in num_stages
    buffers: keys and values, the bias, the places of ALiBi, the numbers of pages. The first of
    them are filled while the queries are still on their way to registers through a tile of their
    own. Weights, and scores of which pages' maxima are taken, may change their layout through
    one, and the sums, when all others are gone.
    `tests/plan/test_triton_plan.py` compares with what Triton allocates.
    """
    m, n, stages = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["num_stages"]
    keys, values = sum(split_size(spec.head_dim)), sum(split_size(spec.values))
    size = BYTES[spec.dtype]
    parts = [
        ("num_stages BLOCK_N (D + Dv) s", stages * n * (keys + values) * size),
        ("BLOCK_M D s", m * keys * size),
        ("BLOCK_M BLOCK_N s", m * n * size),
    ]
    if spec.bias:
        parts.append(("num_stages BLOCK_M BLOCK_N s", stages * m * n * size))
    numbers = spec.alibi + 2 * (spec.kv == "paged") + 2 * spec.selected_blocks
    if numbers:
        parts.append((f"{4 * numbers} num_stages BLOCK_N", 4 * numbers * stages * n))
    if spec.page_max:
        parts.append(("4 BLOCK_M BLOCK_N", 4 * m * n))
    inside = sum(bytes_ for _, bytes_ in parts) + _OVERHEAD
    outside = m * values * (4 if spec.phase == "decode" else size) + _OVERHEAD
    if outside > inside:
        return outside, f"BLOCK_M Dv of the sums + {_OVERHEAD}"
    return inside, " + ".join(text for text, _ in parts) + f" + {_OVERHEAD}, s bytes an element"
