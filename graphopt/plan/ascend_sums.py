"""Tiles and stages of runtime/kernels/ascend_linear_all_reduce.py, for two Ascend devices.

The buffers that triton-ascend and bishengir-compile place are modelled one by one, as those of the
attention kernels are; `tools/check_ascend.py` holds the model to the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from graphopt.errors import LoweringError
from graphopt.plan.base import BYTES, Inequality
from graphopt.plan.rank_schedule import Machine, Schedule, Work, simulate
from graphopt.runtime.reduction_plan import MOST_CHUNKS, Stage, overlapped
from graphopt.targets import Target

_FP32 = 4
_SIDES = (256, 128, 64, 32)


@dataclass(frozen=True)
class NpuFigures:
    """What a plan asks of the devices, since parts of one name differ in it.

    Attributes:
        cores: Cube cores of a device.
        flops: Operations a second of all of them.
        link: Bytes a second to the other device.
        signal: Seconds from a transfer's end until the other device's stream goes on.
    """

    cores: int
    flops: float
    link: float
    signal: float


@dataclass(frozen=True)
class AscendSumPlan:
    """How two devices compute a linear and its sum.

    Attributes:
        shape: Tokens, outputs, a rank's inputs.
        tiles: BLOCK_M, BLOCK_N and BLOCK_K.
        stages: How many tiles each launch has, of a rank's share: first for the other, then again
            for itself.
        share: Tiles that a rank sums.
        inequalities: What the tiles were checked against.
        seconds: Predicted.
        apart: Seconds of the product and the sum one after the other.
    """

    target: str
    shape: tuple[int, int, int]
    tiles: dict[str, int]
    stages: tuple[int, ...]
    share: int
    inequalities: tuple[Inequality, ...]
    seconds: float
    apart: float

    def launches(self, rank: int) -> list[dict[str, int | bool]]:
        """Return what each launch of a rank is given, in their order.

        `first` and `count` are of the kernel; `ADD` says that the stage waits until the tiles have
        arrived that are as far into the share, and `boxed` which tile of all is the box's first.
        """
        rows: list[dict[str, int | bool]] = []
        total = self.tile_count
        for add, owner in ((False, 1 - rank), (True, rank)):
            at, last = owner * self.share, min((owner + 1) * self.share, total)
            for count in self.stages:
                taken = max(0, min(count, last - at))
                rows.append({"first": at, "count": taken, "boxed": owner * self.share, "ADD": add})
                at += taken
        return rows

    @property
    def tile_count(self) -> int:
        """Tiles of the whole output."""
        rows, columns, _ = self.shape
        return -(-rows // self.tiles["BLOCK_M"]) * -(-columns // self.tiles["BLOCK_N"])

    def lines(self) -> list[str]:
        """Return the plan as text, for people and for the head of an emitted source."""
        rows, columns, depth = self.shape
        return [
            f"linear     {rows} tokens, {depth} features to {columns}, summed over 2 devices",
            f"target     {self.target}",
            "tiles      " + ", ".join(f"{name}={size}" for name, size in self.tiles.items()),
            f"stages     {' + '.join(map(str, self.stages))} tiles for the other device, then as "
            "many of its own",
            f"predicted  {1e6 * self.seconds:.0f} us, and {1e6 * self.apart:.0f} us one after the "
            "other",
            *(f"limit      {inequality}" for inequality in self.inequalities),
        ]


def sum_inequalities(target: Target, tiles: dict[str, int], dtype: str) -> list[Inequality]:
    """Return what tiles have to satisfy: what the compiler (ascendnpu-ir 1.2.0) places where."""
    m, n, k = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    size, depth = BYTES[dtype], min(unit.k for unit in target.matrix_units)
    align = target.limit("vector_alignment_bytes")
    rows = [
        ("L0C", f"BLOCK_M BLOCK_N {_FP32}", m * n * _FP32, "L0C"),
        ("L1", f"(BLOCK_M + BLOCK_N) BLOCK_K {size}", (m + n) * k * size, "L1"),
        ("L0A", f"2 BLOCK_M {depth} {size}, two slots of one step of the cube",
         2 * m * depth * size, "L0A"),
        ("L0B", f"2 BLOCK_N {depth} {size}, two slots of one step of the cube",
         2 * n * depth * size, "L0B"),
        # What has arrived as it lies in memory and in fp32, and the sum in 16 bits.
        ("unified buffer", f"5/2 BLOCK_M / 2 BLOCK_N {_FP32}, half the rows a vector core",
         5 * m * n * _FP32 // 4, "UB"),
    ]  # fmt: skip
    found = [
        Inequality(name, formula, value, target.memory_bytes(memory), "bytes", f"memory.{memory}")
        for name, formula, value, memory in rows
    ]
    found.append(
        Inequality(
            "alignment", f"what rows of BLOCK_N and BLOCK_K leave over {align} bytes",
            max(n * size % align, k * size % align), 0, "bytes", "limits.vector_alignment_bytes",
        )
    )  # fmt: skip
    return found


def plan_ascend_sum(
    rows: int, columns: int, depth: int, target: Target, figures: NpuFigures, dtype: str = "f16"
) -> AscendSumPlan:
    """Return tiles and stages of a linear that two devices sum.

    Raises:
        LoweringError: The target has no such dtype, or no tiles fit.
    """
    if dtype not in BYTES or dtype not in target.dtypes or BYTES[dtype] != 2:
        raise LoweringError(
            f"{target.title} sums linears of f16 and bf16, not of {dtype}.",
            "Convert the model to one of them.",
        )
    # Twice: the compiler then lets operands come in while others are multiplied.
    slots = 2 * BYTES[dtype]
    fitting = []
    nearest: list[Inequality] = []
    for m, n, k in product(_SIDES, _SIDES, _SIDES):
        tiles = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
        found = sum_inequalities(target, tiles, dtype)
        broken = [inequality for inequality in found if not inequality.holds]
        if broken:
            nearest = broken if not nearest or len(broken) < len(nearest) else nearest
            continue
        if slots * (m + n) * k > target.memory_bytes("L1"):
            continue
        fitting.append((tiles, found))
    if not fitting:
        raise LoweringError(
            f"No tiles of a linear fit {target.title}: {'; '.join(map(str, nearest))}.",
            "Its file may state memories that are too small.",
        )
    plans = [
        _with_stages(rows, columns, depth, target, figures, tiles, tuple(found))
        for tiles, found in fitting
    ]
    return min(plans, key=lambda plan: (plan.seconds, -plan.tiles["BLOCK_K"]))


def _with_stages(
    rows: int,
    columns: int,
    depth: int,
    target: Target,
    figures: NpuFigures,
    tiles: dict[str, int],
    inequalities: tuple[Inequality, ...],
) -> AscendSumPlan:
    count = -(-rows // tiles["BLOCK_M"]) * -(-columns // tiles["BLOCK_N"])
    share = -(-count // 2)
    best: AscendSumPlan | None = None
    for stages in _stagings(share, figures.cores):
        seconds = overlapped([_stage(n, depth, tiles, figures) for n in (*stages, *stages)])
        if best is None or seconds < best.seconds:
            whole = _stage(count, depth, tiles, figures)
            apart = whole.compute + whole.send + figures.signal
            best = AscendSumPlan(
                target.name, (rows, columns, depth), tiles, stages, share, inequalities, seconds,
                apart,
            )  # fmt: skip
    assert best is not None
    return best


def _tile_seconds(depth: int, tiles: dict[str, int], figures: NpuFigures) -> float:
    m, n, k = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    # A core multiplies while operands of the next step come in; small tiles read more for it.
    reads = (m + n) / (m * n) * 64
    return 2.0 * m * n * (-(-depth // k) * k) * figures.cores / figures.flops * max(1.0, reads)


def _stage(count: int, depth: int, tiles: dict[str, int], figures: NpuFigures) -> Stage:
    waves = -(-count // figures.cores)
    size = 2.0 * tiles["BLOCK_M"] * tiles["BLOCK_N"]
    compute = waves * _tile_seconds(depth, tiles, figures)
    return Stage(compute, count * size / figures.link + figures.signal)


def _stagings(share: int, cores: int) -> list[tuple[int, ...]]:
    """Return ways to launch a share: halves of what is left, in whole waves of tiles."""
    found = []
    for launches in range(1, MOST_CHUNKS + 1):
        sizes, left = [], share
        for _ in range(launches - 1):
            size = min(left, -(-left // (2 * cores)) * cores)
            sizes.append(size)
            left -= size
        if left > 0:
            found.append((*sizes, left))
    return found


def simulate_ascend_sum(plan: AscendSumPlan, figures: NpuFigures) -> Schedule:
    """Return what a plan's launches do on two devices, tile by tile."""
    depth = plan.shape[2]
    size = 2.0 * plan.tiles["BLOCK_M"] * plan.tiles["BLOCK_N"]
    seconds = _tile_seconds(depth, plan.tiles, figures)
    work: list[list[Work]] = []
    for rank in range(2):
        own = []
        for place, launch in enumerate(plan.launches(rank)):
            count = int(launch["count"])
            waves = -(-count // figures.cores)
            # A launch ends with its last wave; what it needs is the other's launch for it.
            needs = ((1 - rank, place - len(plan.stages)),) if launch["ADD"] else ()
            own.append(Work(waves * seconds, ((1 - rank, count * size),), needs))
        work.append(own)
    return simulate(work, Machine(1, figures.link, figures.signal))
