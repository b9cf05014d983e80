"""Tiles of the Hopper kernel in CUDA C++: `wgmma` products fed by the bulk tensor copy engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from graphopt.plan.base import Inequality, Planner
from graphopt.plan.spec import AttentionSpec
from graphopt.runtime.hopper import shared_bytes
from graphopt.targets import Target

# Registers a thread of a consumer may have beside its tiles: addresses, maxima, sums, and what
# the compiler needs to keep two products in flight.
_OVERHEAD = 32


class HopperPlanner(Planner):
    """One warpgroup loads, the others multiply: 64 query rows each."""

    kernel: ClassVar[str] = "hopper-cuda"

    def limits(self, spec: AttentionSpec, target: Target) -> str | None:
        if "wgmma" not in target.features:
            return f"it multiplies by wgmma, which {target.title} has not"
        if spec.phase == "decode":
            return "it has 64 rows a warpgroup, which decoding does not fill"
        for name in ("chunk", "alibi", "padding_mask", "bias"):
            if getattr(spec, name):
                return f"it does not do {name}"
        if spec.kv != "contiguous":
            return f"its copy engine reads contiguous keys, not a {spec.kv} cache"
        if spec.head_dim % 16 or spec.values % 16:
            return "its products take 16 elements of a head at once"
        return None

    def candidates(self, spec: AttentionSpec, target: Target) -> Sequence[dict[str, int]]:
        found = [
            {"CONSUMERS": consumers, "BLOCK_M": 64 * consumers, "BLOCK_N": n, "STAGES": stages}
            for consumers in (3, 2, 1)
            for n in range(128, 15, -16)
            for stages in (2, 3)
        ]

        def worth(tiles: dict[str, int]) -> tuple[int, int, int]:
            return (tiles["BLOCK_M"] * tiles["BLOCK_N"], tiles["BLOCK_N"], -tiles["STAGES"])

        return sorted(found, key=worth, reverse=True)

    def inequalities(
        self, spec: AttentionSpec, target: Target, tiles: dict[str, int]
    ) -> list[Inequality]:
        n, consumers = tiles["BLOCK_N"], tiles["CONSUMERS"]
        # And the number of a tile, which lies in memory of fixed size.
        shared = shared_bytes(spec.head_dim, spec.values, tiles) + 16
        registers = spec.values // 2 + n // 2 + n // 4 + _OVERHEAD
        return [
            Inequality(
                "shared memory",
                "2 (BLOCK_M D + STAGES BLOCK_N (D + Dv)), D and Dv in whole panels of 64, "
                "+ 32 (1 + STAGES) of barriers + 1040 to align them and number tiles",
                shared,
                target.limit("shared_bytes_per_block"),
                "bytes",
                "limits.shared_bytes_per_block",
            ),
            Inequality(
                "registers",
                f"Dv / 2 of sums + BLOCK_N / 2 of scores + BLOCK_N / 4 of weights + {_OVERHEAD}",
                registers,
                consumer_registers(target, consumers),
                "a thread",
                "memory.registers, shared out",
            ),
        ]


def consumer_registers(target: Target, consumers: int) -> int:
    """Return how many registers a consumer's thread gets: what the loader leaves, in eights."""
    left = target.memory_bytes("registers") // 4 // 128 - loader_registers(consumers)
    return min(left // consumers // 8 * 8, 240)


def loader_registers(consumers: int) -> int:
    """Return how many registers the loading warpgroup's threads keep."""
    return 32 if consumers > 2 else 24
