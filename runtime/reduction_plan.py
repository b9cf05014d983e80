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

How = Literal["persistent", "chunks", "attention-chunks", "two-shot", "one-shot", "library"]
"""persistent: a kernel that sends each finished tile; chunks: products of some rows each, which the
copy engines send; attention-chunks: the same, of attention and product; two-shot, one-shot: a
product, then a kernel that sums; library: a product, then the all-reduce of torch.distributed."""

MOST_CHUNKS = 5
"""Chunks into which the rows that a rank sums are cut."""
LEAST_CHUNK = 128
"""Rows of a chunk at least."""


@dataclass(frozen=True)
class LinearTiles:
    """Tiles of the persistent kernel.

    Attributes:
        rows, columns, depth: A tile's tokens, its outputs, and what is summed over at a time.
        flops: Operations a second of their products, on all cores.
        beside: Seconds that a tile takes beside its product.
        group: Tiles of tokens that share rows of the weight while those are in the cache.
        programs: How many of it a core runs.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    flops: float
    beside: float
    group: int = 8
    programs: int = 1


@dataclass(frozen=True)
class ReductionFigures:
    """What a target's file says of ranks on GPUs that are linked.

    Attributes:
        cores: Of a GPU.
        flops: Operations a second of the library's products, at large sizes.
        launch: Seconds that a product takes beside its tiles.
        link: Bytes a second that a kernel sends to a peer while it receives as many.
        push: The same of the persistent kernel, tile by tile.
        copy_engine: The same by the copy engines.
        copy_start: Seconds of a copy beside its bytes, until the peer has seen that it is there.
        signal: Seconds until a peer has seen a kernel's signal.
        library: Bytes a second of an all-reduce of torch.distributed, over the bytes of its result.
        library_start: Seconds that such a one takes beside them.
        one_shot_bytes: Up to how many bytes a rank sends all it has to all.
        one_shot: Seconds that this takes.
        programs: Of the kernel that sums by two shots.
        attention_flops: Operations a second of attention over many tokens.
        chunk_launch: Seconds in which the host launches a chunk's product and copies; None of a
            recorded step, which launches nothing.
        attention_chunk_launch: The same with attention in front.
        least_gain: Share of the time that chunks of attention have to gain, as predicted.
        tiles: Of the persistent kernel; a plan takes what is fastest by the model.
    """

    cores: int
    flops: float
    launch: float
    link: float
    push: float
    copy_engine: float
    copy_start: float
    signal: float
    library: float
    library_start: float
    one_shot_bytes: int
    one_shot: float
    programs: int
    attention_flops: float
    chunk_launch: float | None
    attention_chunk_launch: float | None
    least_gain: float
    tiles: tuple[LinearTiles, ...]

    def recorded(self) -> ReductionFigures:
        """Return the figures of steps in CUDA graphs."""
        return replace(self, chunk_launch=None, attention_chunk_launch=None)


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
        chunks: With either kind of chunks, the rows of each, of those that a rank sums.
        tiles: With `persistent`, those of the kernel.
        others: Predicted seconds of the plans that were not taken, or why one is none.
    """

    how: How
    seconds: float
    stages: tuple[Stage, ...]
    chunks: tuple[int, ...] | None = None
    tiles: LinearTiles | None = None
    others: dict[str, float | str] = field(default_factory=dict)

    def line(self) -> str:
        """Return the plan and what it was taken for, as text."""
        rest = ", ".join(
            f"{name} {1e6 * told:.0f}" if isinstance(told, float) else f"no {name}: {told}"
            for name, told in self.others.items()
        )
        cut = f" of {'+'.join(map(str, self.chunks))} rows" if self.chunks else ""
        if self.tiles:
            cut = f" of {self.tiles.rows} x {self.tiles.columns}"
        return f"{self.how}{cut}, {1e6 * self.seconds:.0f} us predicted ({rest})"


_QUERIES = 128
"""Queries of a tile of attention."""


@dataclass(frozen=True)
class CausalAttention:
    """Attention of the new tokens of some texts, of each as many.

    A row is a new token: those of a text, then those of the next one.

    Attributes:
        tokens: New ones of a text.
        heads: Query heads of a rank.
        texts: How many.
        past: Keys of a text in front of its first new token.
        most_keys: That a query sees at most, in a window say; None for all.
    """

    tokens: int
    heads: int
    texts: int = 1
    past: int = 0
    most_keys: int | None = None

    def seconds(self, start: int, stop: int, depth: int, figures: ReductionFigures) -> float:
        """Return the seconds of some rows: of all their tiles, or the longest of fewer than cores.

        Args:
            start, stop: The first row and the one behind the last.
            depth: The heads times their size.
        """
        keys = self._seen_until(stop) - self._seen_until(start)
        last = (stop - 1) % self.tokens if stop - start <= stop % self.tokens else self.tokens - 1
        deepest = self.past + last + 1
        if self.most_keys is not None:
            deepest = min(deepest, self.most_keys)
        tile = _QUERIES * deepest * figures.cores / self.heads
        return 4.0 * max(keys, tile) * depth / figures.attention_flops

    def _seen_until(self, row: int) -> float:
        """Return how many keys the rows in front of one see together."""
        texts, tokens = divmod(row, self.tokens)
        return texts * self._seen_by(self.tokens) + self._seen_by(tokens)

    def _seen_by(self, tokens: int) -> float:
        """Return how many keys the first so many new tokens of a text see together."""
        if self.most_keys is None:
            return self.past * tokens + tokens**2 / 2
        growing = min(tokens, max(0, self.most_keys - self.past))
        return self.past * growing + growing**2 / 2 + self.most_keys * (tokens - growing)


def overlapped(stages: Sequence[Stage]) -> float:
    """Return the seconds of stages of which each is sent while the next one is computed."""
    between = sum(max(after.compute, before.send) for before, after in itertools.pairwise(stages))
    return stages[0].compute + between + stages[-1].send


_LIBRARY_TILES = ((128, 256, 1.0), (128, 128, 0.93), (64, 128, 0.8))
"""Tiles that the library takes, and at what share of its best rate."""


def product_seconds(rows: int, columns: int, depth: int, figures: ReductionFigures) -> float:
    """Return the seconds of the library's product, by whole waves of the tiles that suit best."""

    def seconds(tile_rows: int, tile_columns: int, share: float) -> float:
        tiles = -(-rows // tile_rows) * -(-columns // tile_columns)
        wave = _wave(tile_rows, tile_columns, depth, figures.cores, share * figures.flops)
        return -(-tiles // figures.cores) * wave

    return figures.launch + min(seconds(*tile) for tile in _LIBRARY_TILES)


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
    return replace(best, others=others)


def plan_attention_linear(
    attention: CausalAttention, columns: int, depth: int, ranks: int, figures: ReductionFigures
) -> LinearPlan:
    """Return the fastest plan of causal attention, its output projection and the sum over ranks.

    In chunks, attention of the next rows runs while a chunk's results are sent; else attention
    comes first, as a whole, and the projection is summed as `plan_linear` says: also where chunks
    gain less than the model can tell. An odd number of rows has one more that is empty, so that
    ranks sum as many.

    Args:
        columns: Outputs.
        depth: A rank's heads times their size.
    """
    rows = attention.texts * attention.tokens
    linear = plan_linear(rows, columns, depth, ranks, figures)
    whole = attention.seconds(0, rows, depth, figures)
    first = Stage(whole + linear.stages[0].compute, linear.stages[0].send)
    stages = (first, *linear.stages[1:])
    apart = replace(linear, seconds=whole + linear.seconds, stages=stages)

    def compute(start: int, stop: int) -> float:
        product = product_seconds(stop - start, columns, depth, figures)
        return attention.seconds(start, min(stop, rows), depth, figures) + product

    launch = figures.attention_chunk_launch
    cut = _best_chunks(rows + rows % 2, columns, ranks, figures, compute, launch)
    if isinstance(cut, str):
        return replace(apart, others={"chunks": cut})
    if cut.seconds < (1 - figures.least_gain) * apart.seconds:
        others: dict[str, float | str] = {f"attention, then {apart.how}": apart.seconds}
        return replace(cut, how="attention-chunks", others=others)
    return replace(apart, others={"chunks of attention": cut.seconds})


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
    if depth % 8 or columns % 8:
        return "the copy engine takes rows of whole 16 bytes"
    fitting = [tiles for tiles in figures.tiles if rows >= tiles.rows]
    if not fitting:
        return "fewer rows than a tile has"
    plans = [_persistent_by(tiles, rows, columns, depth, ranks, figures) for tiles in fitting]
    return min(plans, key=lambda plan: plan.seconds)


def _persistent_by(
    tiles: LinearTiles, rows: int, columns: int, depth: int, ranks: int, figures: ReductionFigures
) -> LinearPlan:
    count = -(-rows // tiles.rows) * -(-columns // tiles.columns)
    at_once = figures.cores * tiles.programs
    # A core's programs share its matrix unit.
    wave = _wave(tiles.rows, tiles.columns, depth, at_once, tiles.flops) + tiles.beside
    size = 2.0 * tiles.rows * tiles.columns
    stages, left = [], count
    others = count - -(-count // ranks)
    while left > 0:
        now = min(left, at_once)
        # What others sum is sent to one of them, what this rank sums to all.
        to_one = max(0, min(now, others - (count - left)))
        sent = (to_one + (now - to_one) * (ranks - 1)) * size
        stages.append(Stage(wave, sent / figures.push))
        left -= now
    stages[0] = replace(stages[0], compute=figures.launch + stages[0].compute)
    # The last sums, and then that they are all there.
    stages[-1] = replace(stages[-1], send=stages[-1].send + 2 * figures.signal)
    return LinearPlan("persistent", overlapped(stages), tuple(stages), tiles=tiles)


def _chunks(
    rows: int, columns: int, depth: int, ranks: int, figures: ReductionFigures, bias: bool
) -> LinearPlan | str:
    if bias:
        return "a chunk is added to what has arrived, and has no place for a bias besides"

    def seconds(start: int, stop: int) -> float:
        return product_seconds(stop - start, columns, depth, figures)

    return _best_chunks(rows, columns, ranks, figures, seconds, figures.chunk_launch)


def _best_chunks(
    rows: int,
    columns: int,
    ranks: int,
    figures: ReductionFigures,
    compute: Callable[[int, int], float],
    launch: float | None,
) -> LinearPlan | str:
    """Return the fastest plan of chunks, or why there is none.

    A host that launches chunks for longer than they take is what a layer waits for.

    Args:
        compute: From the first row and the one behind the last to seconds.
        launch: Seconds of the host for a chunk.
    """
    if ranks != 2:
        return f"of 2 ranks, and there are {ranks}"
    best: LinearPlan | None = None
    for chunks in chunkings(rows // 2, rows - rows // 2):
        # Of the first rank, which begins with the rows behind; the other has as much to do.
        stages, start = [], rows // 2
        for number, size in enumerate((*chunks, *chunks)):
            start %= rows
            send = figures.copy_start + 2.0 * size * columns / figures.copy_engine
            # A kernel that waits stands before each sum.
            waits = figures.signal if number >= len(chunks) else 0.0
            stages.append(Stage(waits + compute(start, start + size), send))
            start += size
        seconds = max(_chunk_seconds(stages), len(stages) * (launch or 0.0))
        if best is None or seconds < best.seconds:
            best = LinearPlan("chunks", seconds, tuple(stages), chunks)
    return best or f"{rows} rows, which are not cut"


def _chunk_seconds(stages: Sequence[Stage]) -> float:
    """Return the seconds of chunks: copies queue, and a sum waits for what it is added to."""
    computed = copied = 0.0
    arrived: list[float] = []
    for number, stage in enumerate(stages):
        if number >= len(stages) // 2:
            computed = max(computed, arrived[number - len(stages) // 2])
        computed += stage.compute
        copied = max(copied, computed) + stage.send
        arrived.append(copied)
    return copied


def chunkings(low: int, high: int) -> list[tuple[int, ...]]:
    """Return ways to cut a rank's share of rows, each chunk about half of what is left.

    Args:
        low, high: The shares of the ranks, which must be alike: with others there is no way.
    """
    if low != high or low < LEAST_CHUNK:
        return []
    found: list[tuple[int, ...]] = []
    for count in range(1, MOST_CHUNKS + 1):
        sizes, left = [], low
        for _ in range(count - 1):
            size = -(-left // 256) * 128
            sizes.append(size)
            left -= size
        if left < LEAST_CHUNK:
            break
        found.append((*sizes, left))
    return found
