"""How a row-parallel linear is computed and summed over ranks, and how long that takes: a model.

Nothing here imports torch: planners, the launcher of an emitted model, and a simulation share it.

A plan cuts the work into stages of compute c_i, and of communication r_i that can begin once its
compute is done and goes on beside the next one's:

    T = c_1 + sum of max(c_(i+1), r_i) + r_n

Source: FastAttention, arXiv 2410.16663, section on tiling-AllReduce; the terms are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

How = Literal["persistent", "chunks", "two-shot", "one-shot", "library"]
"""persistent: a kernel that sends each finished tile; chunks: products of some rows each, which the
copy engines send; two-shot, one-shot: a product, then a kernel that sums; library: a product, then
the all-reduce of torch.distributed."""

MOST_CHUNKS = 5
"""Chunks into which the rows that a rank sums are cut."""


@dataclass(frozen=True)
class LinearTiles:
    """Tiles of the persistent kernel.

    Attributes:
        rows, columns, depth: A tile's tokens, its outputs, and what is summed over at a time.
        group: Tiles of tokens that share rows of the weight while those are in the cache.
        programs: How many of it a core runs.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    programs: int = 1


@dataclass(frozen=True)
class ReductionFigures:
    """What a target's file says of ranks on GPUs that are linked.

    Attributes:
        cores: Of a GPU.
        flops: Operations a second of the library's products, at large sizes.
        tile_flops: The same of the persistent kernel's.
        launch: Seconds that a product takes beside its tiles.
        link: Bytes a second that a kernel sends to a peer while it receives as many.
        copy_engine: The same by the copy engines.
        signal: Seconds until a peer has seen a signal, launches included.
        library: Bytes a second of an all-reduce of torch.distributed, over the bytes of its result.
        library_start: Seconds that such a one takes beside them.
        one_shot_bytes: Up to how many bytes a rank sends all it has to all.
        one_shot: Seconds that this takes.
        programs: Of the kernel that sums by two shots.
        attention_flops: Operations a second of attention over many tokens.
        tiles: Of the persistent kernel.
    """

    cores: int
    flops: float
    tile_flops: float
    launch: float
    link: float
    copy_engine: float
    signal: float
    library: float
    library_start: float
    one_shot_bytes: int
    one_shot: float
    programs: int
    attention_flops: float
    tiles: LinearTiles


@dataclass(frozen=True)
class Stage:
    """A stage of a plan: seconds of compute, and of sending what came of it."""

    compute: float
    send: float


@dataclass(frozen=True)
class LinearPlan:
    """How a linear is computed and summed.

    Attributes:
        how: See `How`.
        seconds: Predicted.
        stages: What overlaps.
        chunks: With `chunks`, the rows of each chunk of a rank's share, in their order.
        others: Predicted seconds of the plans that were not taken, or why one is none.
    """

    how: How
    seconds: float
    stages: tuple[Stage, ...]
    chunks: tuple[int, ...] = ()
    others: dict[str, float | str] = field(default_factory=dict)

    def line(self) -> str:
        """Return the plan and what it was taken for, as text."""
        rest = ", ".join(
            f"{name} {1e6 * told:.0f}" if isinstance(told, float) else f"no {name}: {told}"
            for name, told in self.others.items()
        )
        cut = f" of {'+'.join(map(str, self.chunks))} rows" if self.chunks else ""
        return f"{self.how}{cut}, {1e6 * self.seconds:.0f} us predicted ({rest})"


def overlapped(stages: Sequence[Stage]) -> float:
    """Return the seconds of stages of which each is sent while the next one is computed."""
    between = sum(max(after.compute, before.send) for before, after in itertools.pairwise(stages))
    return stages[0].compute + between + stages[-1].send


def product_seconds(rows: int, columns: int, depth: int, figures: ReductionFigures) -> float:
    """Return the seconds of the library's product, by whole waves of tiles."""
    tiles = -(-rows // 128) * -(-columns // 256)
    waves = -(-tiles // figures.cores)
    return figures.launch + waves * _wave(128, 256, depth, figures.cores, figures.flops)


def _wave(rows: int, columns: int, depth: int, cores: int, flops: float) -> float:
    return 2.0 * rows * columns * depth * cores / flops


def sent_bytes(rows: int, columns: int, ranks: int) -> float:
    """Return the bytes that a rank sends in a two-shot sum of 16-bit numbers."""
    return 2.0 * rows * columns * 2 * (ranks - 1) / ranks


def plan_linear(
    rows: int,
    columns: int,
    depth: int,
    ranks: int,
    figures: ReductionFigures,
    *,
    bias: bool = False,
) -> LinearPlan:
    """Return the fastest plan by the model; the library's all-reduce where none gains.

    Args:
        rows, columns, depth: Tokens, outputs, and a rank's inputs.
        bias: Whether something is added to the product.
    """
    made: dict[str, LinearPlan | str] = {
        "persistent": _persistent(rows, columns, depth, ranks, figures),
        "chunks": _chunks(rows, columns, depth, ranks, figures, bias),
        "two-shot": _two_shot(rows, columns, depth, ranks, figures),
        "one-shot": _one_shot(rows, columns, depth, figures),
        "library": _library(rows, columns, depth, figures),
    }
    plans = [plan for plan in made.values() if isinstance(plan, LinearPlan)]
    best = min(plans, key=lambda plan: plan.seconds)
    others: dict[str, float | str] = {
        name: plan if isinstance(plan, str) else plan.seconds
        for name, plan in made.items()
        if plan is not best
    }
    return LinearPlan(best.how, best.seconds, best.stages, best.chunks, others)


def plan_attention_linear(
    rows: int, columns: int, depth: int, ranks: int, figures: ReductionFigures, *, past: int = 0
) -> LinearPlan:
    """Return the fastest plan of causal attention, its output projection and the sum over ranks.

    In chunks, attention of the next rows runs while a chunk's results are sent; else attention
    comes first, as a whole, and the projection is summed as `plan_linear` says.

    Args:
        rows, columns: Query tokens of one text, outputs.
        depth: A rank's heads times their size.
        past: Keys in front of the first query.
    """

    def attend(start: int, stop: int) -> float:
        keys = past + (start + stop) / 2
        return 4.0 * (stop - start) * keys * depth / figures.attention_flops

    linear = plan_linear(rows, columns, depth, ranks, figures)
    whole = attend(0, rows)
    first = Stage(whole + linear.stages[0].compute, linear.stages[0].send)
    stages = (first, *linear.stages[1:])
    apart = LinearPlan(linear.how, whole + linear.seconds, stages, linear.chunks)
    cut = _attention_chunks(rows, columns, depth, ranks, figures, attend)
    if isinstance(cut, str):
        return replace(apart, others={"chunks": cut})
    if cut.seconds < apart.seconds:
        return replace(cut, others={f"attention, then {apart.how}": apart.seconds})
    return replace(apart, others={"chunks of attention": cut.seconds})


def _attention_chunks(
    rows: int,
    columns: int,
    depth: int,
    ranks: int,
    figures: ReductionFigures,
    attend: Callable[[int, int], float],
) -> LinearPlan | str:
    if ranks != 2:
        return f"of 2 ranks, and there are {ranks}"
    best: LinearPlan | None = None
    for chunks in chunkings(rows // 2, rows - rows // 2):
        # Of the first rank, which begins with the rows behind; the other has as much to do.
        stages, start = [], rows // 2
        for size in (*chunks, *chunks):
            start %= rows
            compute = attend(start, start + size) + product_seconds(size, columns, depth, figures)
            send = figures.signal + 2.0 * size * columns / figures.copy_engine
            stages.append(Stage(compute, send))
            start += size
        seconds = overlapped(stages) + figures.signal
        if best is None or seconds < best.seconds:
            best = LinearPlan("chunks", seconds, tuple(stages), chunks)
    return best or f"{rows} rows, which are not cut"


def _library(rows: int, columns: int, depth: int, figures: ReductionFigures) -> LinearPlan:
    compute = product_seconds(rows, columns, depth, figures)
    send = figures.library_start + 2.0 * rows * columns / figures.library
    return LinearPlan("library", compute + send, (Stage(compute, send),))


def _two_shot(
    rows: int, columns: int, depth: int, ranks: int, figures: ReductionFigures
) -> LinearPlan:
    compute = product_seconds(rows, columns, depth, figures)
    send = 2 * figures.signal + sent_bytes(rows, columns, ranks) / figures.link
    return LinearPlan("two-shot", compute + send, (Stage(compute, send),))


def _one_shot(rows: int, columns: int, depth: int, figures: ReductionFigures) -> LinearPlan | str:
    if 2 * rows * columns > figures.one_shot_bytes:
        return f"for up to {figures.one_shot_bytes:,} bytes"
    compute = product_seconds(rows, columns, depth, figures)
    stage = Stage(compute, figures.one_shot)
    return LinearPlan("one-shot", overlapped([stage]), (stage,))


def _persistent(
    rows: int, columns: int, depth: int, ranks: int, figures: ReductionFigures
) -> LinearPlan | str:
    tiles = figures.tiles
    if depth % 8 or columns % 8:
        return "the copy engine takes rows of whole 16 bytes"
    count = -(-rows // tiles.rows) * -(-columns // tiles.columns)
    at_once = figures.cores * tiles.programs
    # A core's programs share its matrix unit.
    wave = _wave(tiles.rows, tiles.columns, depth, at_once, figures.tile_flops)
    size = 2.0 * tiles.rows * tiles.columns
    stages, left = [], count
    others = count - -(-count // ranks)
    while left > 0:
        now = min(left, at_once)
        # What others sum is sent to one of them, what this rank sums to all.
        to_one = max(0, min(now, others - (count - left)))
        sent = (to_one + (now - to_one) * (ranks - 1)) * size
        stages.append(Stage(wave, sent / figures.link))
        left -= now
    stages[0] = Stage(figures.launch + stages[0].compute, stages[0].send)
    last = Stage(stages[-1].compute, stages[-1].send + figures.signal)
    stages[-1] = last
    return LinearPlan("persistent", overlapped(stages), tuple(stages))


def _chunks(
    rows: int, columns: int, depth: int, ranks: int, figures: ReductionFigures, bias: bool
) -> LinearPlan | str:
    if ranks != 2:
        return f"of 2 ranks, and there are {ranks}"
    if bias:
        return "a chunk is added to what has arrived, and has no place for a bias besides"
    best: LinearPlan | None = None
    for chunks in chunkings(rows // 2, rows - rows // 2):
        stages = [
            Stage(
                product_seconds(size, columns, depth, figures),
                figures.signal + 2.0 * size * columns / figures.copy_engine,
            )
            for size in (*chunks, *chunks)
        ]
        seconds = overlapped(stages) + figures.signal
        if best is None or seconds < best.seconds:
            best = LinearPlan("chunks", seconds, tuple(stages), chunks)
    return best or f"{rows} rows, which are not cut"


def chunkings(low: int, high: int) -> list[tuple[int, ...]]:
    """Return ways to cut a rank's share of rows: halves of what is left, `MOST_CHUNKS` at most.

    Args:
        low, high: The shares of the ranks, which must be alike: with others there is no way.
    """
    if low != high or low < 128:
        return []
    found: list[tuple[int, ...]] = []
    for count in range(1, MOST_CHUNKS + 1):
        sizes, left = [], low
        for _ in range(count - 1):
            size = -(-left // 256) * 128
            sizes.append(size)
            left -= size
        if left < 128:
            break
        found.append((*sizes, left))
    return found
