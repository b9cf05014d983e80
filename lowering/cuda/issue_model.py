"""How long a Volta takes for an attention, from its machine code alone: a static issue model.

The warps that a core holds run the main loop of the kernel, instruction by instruction and in
order: each waits for the stall cycles and the scoreboards that the compiler wrote into it, for
its scheduler, and for its unit. What a tile takes, the tiles of each block of a causal prefill,
and the order in which blocks come to cores give the time. Nothing is run.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.lowering.cuda.sass import Instruction, Listing

SUB_CORES = 4
"""Parts of a core: each has a scheduler that starts one instruction a cycle, and its own units."""

# Cycles, on a V100. Measured, in 1CatAI/1Cat-vLLM, docs/design: a product of a warp (four
# HMMA.884) 8.38, a load from shared memory 26.4, a load that the second cache holds 211.
_STEP = 8.38 / 4
_SHARED_LATENCY = 26.4
_GLOBAL_LATENCY = 211.0
# Lanes a cycle of one part, by the CUDA C++ Programming Guide (throughput of native arithmetic
# instructions, 7.0): 16 of fp32, 16 of integers, 4 of special functions and conversions.
_ARITHMETIC = 32 / 16
_SPECIAL = 32 / 4

CLOCK = 1.53e9
"""Cycles a second: NVIDIA Tesla V100 GPU Architecture, WP-08608 (SXM2)."""

LAUNCH = 5e-6
"""Seconds from a launch to the first block and from the last to the end: of that order."""

_WARM, _COUNTED = 2, 4  # rounds

_FP32 = {"FADD", "FMUL", "FFMA", "IMAD"}
_SPECIALS = {"MUFU", "F2F", "F2I", "I2F"}
_SHARED = {"LDS", "STS", "SHFL"}
_NO_UNIT = {"BAR", "BRA", "NOP", "VOTE", "BSSY", "BSYNC", "WARPSYNC", "S2R", "EXIT"}
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128)\b")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Work:
    """What an instruction asks of the machine.

    Attributes:
        unit: `matrix`, `fp32`, `integer` or `special` of its part, `shared` of the whole core,
            or empty where it takes a slot of the scheduler alone.
        cycles: The unit is busy.
        latency: Cycles from then until its scoreboards are released.
    """

    unit: str
    cycles: float = 0.0
    latency: float = 0.0


def work_of(instruction: Instruction) -> Work:
    """Return what an instruction asks for.

    Accesses to memory take as many cycles of the core's path of 128 bytes as the bank model has
    wavefronts for the kernels' layouts, the fewest there can be: 1 for 4 bytes a lane, 2 for 8
    and 4 for 16.
    """
    name = instruction.name
    if name == "HMMA":
        return Work("matrix", _STEP)
    if name in _FP32:
        return Work("fp32", _ARITHMETIC)
    if name in _SPECIALS:
        return Work("special", _SPECIAL, _SHARED_LATENCY)
    if name in _SHARED or name in ("LDG", "STG"):
        width = _WIDTH.search(instruction.opcode)
        wavefronts = max(1, _BYTES[width[1]] // 4) if width and name != "SHFL" else 1
        latency = _GLOBAL_LATENCY if name == "LDG" else _SHARED_LATENCY
        return Work("shared", wavefronts, latency)
    if name in _NO_UNIT:
        return Work("", 0.0, _SHARED_LATENCY)
    return Work("integer", _ARITHMETIC)


def loop_path(kernel: Listing, *, edge: bool) -> list[Instruction]:
    """Return the main loop as one round executes it.

    What a branch forward skips is a mask if it compares and neither loads nor stores: only
    tiles at an edge run it. All else is run: the next tile's way in, and the scaling of the sums,
    which tiles that raise no maximum leave out.
    """
    loop = kernel.main_loop()
    path: list[Instruction] = []
    index = loop.start
    while index < loop.stop:
        instruction = kernel.instructions[index]
        path.append(instruction)
        target = kernel.target(index)
        index += 1
        if target is not None and index < target <= loop.stop:
            names = {kernel.instructions[i].name for i in range(index, target)}
            if "ISETP" in names and not names & {"LDG", "STS"} and not edge:
                index = target
    return path


def round_cycles(path: Sequence[Instruction], *, warps: int, blocks: int = 1) -> float:
    """Return the cycles in which every warp of a core does one round of a loop, once it is warm.

    The warp that could start first does, of several the one that has waited longest. A unit of a
    part makes the scheduler wait; the path to memory has a queue.

    Args:
        path: The instructions of a round.
        warps: The number of warps of a block.
        blocks: Resident in a core.
    """
    works = [work_of(instruction) for instruction in path]
    count = warps * blocks
    scheduler = [0.0] * SUB_CORES
    units: dict[tuple[int, str], float] = {}
    position, ready = [0] * count, [0.0] * count
    released = [[0.0] * 6 for _ in range(count)]
    waiting: list[list[int]] = [[] for _ in range(blocks)]
    ends: list[float] = []
    queue = [(0.0, 0.0, warp) for warp in range(count)]
    while len(ends) < (_WARM + _COUNTED) * count:
        asked, _, warp = heapq.heappop(queue)
        instruction, work = path[position[warp]], works[position[warp]]
        part = warp % SUB_CORES
        unit = (0 if work.unit == "shared" else part, work.unit)
        start = max(ready[warp], scheduler[part], *(released[warp][i] for i in instruction.waits))
        if work.unit in ("matrix", "fp32", "integer"):
            start = max(start, units.get(unit, 0.0))
        if start > asked:
            heapq.heappush(queue, (start, ready[warp], warp))
            continue
        scheduler[part] = start + 1
        begun = max(start, units.get(unit, 0.0)) if work.unit else start
        units[unit] = done = begun + work.cycles
        for number, late in ((instruction.writes, work.latency), (instruction.reads, 0.0)):
            if number is not None:
                released[warp][number] = max(released[warp][number], done + late)
        ready[warp] = start + max(instruction.stall, 1)
        position[warp] += 1
        if position[warp] == len(path):
            position[warp] = 0
            ends.append(ready[warp])
        going = [warp]
        if instruction.name == "BAR":
            block = waiting[warp // warps]
            block.append(warp)
            going = []
            if len(block) == warps:
                together = max(ready[other] for other in block)
                for other in block:
                    ready[other] = together
                going, waiting[warp // warps] = block, []
        for other in going:
            heapq.heappush(queue, (ready[other], ready[other], other))
    ends.sort()
    return (ends[-1] - ends[_WARM * count - 1]) / _COUNTED


@dataclass(frozen=True)
class Causal:
    """A causal prefill of fp16, as many keys as queries.

    Attributes:
        length: Queries of a sequence.
        head_dim: The head size of keys and values.
        heads: Query heads, times the sequences.
        block_m, block_n: Rows and keys of a tile.
        longest_first: Whether the last rows of a head, which see the most keys, start first.
    """

    length: int
    head_dim: int
    heads: int
    block_m: int
    block_n: int
    longest_first: bool

    @property
    def flops(self) -> float:
        """Operations, by the convention that causal attention is half of the full."""
        return 2.0 * self.length**2 * self.head_dim * self.heads

    def tiles(self) -> list[tuple[int, int]]:
        """Return the inner and the edge tiles of every block, in the order they start."""
        found = []
        for start in range(0, self.length, self.block_m):
            inner = (start + 1) // self.block_n
            last = min(start + self.block_m, self.length)
            found.append((inner, -(-last // self.block_n) - inner))
        if self.longest_first:
            found.reverse()
        return found * self.heads


def seconds(
    causal: Causal,
    inner: float,
    edge: float,
    *,
    cores: int,
    bandwidth: float,
    blocks: int = 1,
    factor: float = 1.0,
) -> float:
    """Return how long a causal prefill takes: the next block goes to the place that is free first.

    Args:
        causal: The problem.
        inner, edge: Cycles of a round with and without masks, of all blocks a core holds.
        cores, bandwidth: The machine's cores, and bytes a second of its memory.
        blocks: That a core holds at once.
        factor: What a round takes beyond the model, as a factor: the one constant to be fitted.
    """
    places = [0.0] * (cores * blocks)
    # Queries come and results go at a core's share of the memory.
    moved = 2 * 2 * causal.block_m * causal.head_dim * len(places) / bandwidth
    for whole, masked in causal.tiles():
        busy = factor * (whole * inner + masked * edge) / CLOCK + moved
        heapq.heapreplace(places, places[0] + busy)
    return LAUNCH + max(places)


def fitted(
    causal: Causal, measured: float, inner: float, edge: float, *, cores: int, bandwidth: float
) -> float:
    """Return the factor with which the model gives a measured time, in seconds, to four digits.

    Args: as those of `seconds`.

    Raises:
        ValueError: No factor does: the rest takes longer than was measured.
    """
    low, high = 0.0, 1e3

    def time(factor: float) -> float:
        return seconds(causal, inner, edge, cores=cores, bandwidth=bandwidth, factor=factor)

    if not time(low) < measured < time(high):
        raise ValueError(
            f"{measured:.3e} s is out of the model's reach: {time(low):.3e} s at least"
        )
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if time(middle) < measured else (low, middle)
    return high
