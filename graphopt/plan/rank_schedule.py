"""A simulation, event by event, of ranks that compute tiles and send them to each other.

Plans are found by a formula over stages (`graphopt.runtime.reduction_plan`); this says when each
tile is computed, sent and summed, by the same figures. Tests hold the formula to it, and for a
machine that is not at hand it is what a schedule is looked at by.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Work:
    """A tile, or a chunk, as a core of a rank gets it.

    Attributes:
        compute: Seconds.
        sends: Bytes, by the rank that they go to.
        needs: What has to have arrived before it is sent: (rank, number) of other ranks' work.
    """

    compute: float
    sends: tuple[tuple[int, float], ...] = ()
    needs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Machine:
    """What the work of a rank runs on.

    Attributes:
        cores: That each work at one tile; tiles go around among them.
        link: Bytes a second to each other rank, beside what comes from there.
        signal: Seconds from the end of a transfer until the other rank has seen it.
        start: Seconds before the first tile.
        queues: Whether what is sent waits in memory: a core hands it on at once. Else a core has
            room for one tile on its way.
    """

    cores: int
    link: float
    signal: float
    start: float = 0.0
    queues: bool = False


@dataclass(frozen=True)
class Span:
    """When something was done: a tile computed by a rank, or what it sent on its way."""

    rank: int
    number: int
    what: str
    begin: float
    end: float


@dataclass
class Schedule:
    """What a simulation gives.

    Attributes:
        seconds: When the last rank has all that the others sum.
        spans: Everything that was done, in the order in which it began.
    """

    seconds: float
    spans: list[Span] = field(default_factory=list)

    def overlap(self, rank: int) -> float:
        """Return the seconds in which a rank computes while something of it is on its way."""
        busy = _union([s for s in self.spans if s.rank == rank and s.what == "compute"])
        sent = _union([s for s in self.spans if s.rank == rank and s.what == "send"])
        return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in busy for b in sent)

    def busy(self, rank: int, what: str) -> float:
        """Return the seconds in which a rank computes, or sends, at all."""
        return sum(
            end - begin
            for begin, end in _union([s for s in self.spans if s.rank == rank and s.what == what])
        )


def _union(spans: Sequence[Span]) -> list[tuple[float, float]]:
    whole: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda s: s.begin):
        if whole and span.begin <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(whole[-1][1], span.end))
        else:
            whole.append((span.begin, span.end))
    return whole


def simulate(work: Sequence[Sequence[Work]], machine: Machine) -> Schedule:
    """Return when the ranks' work is done.

    A core computes a tile, waits for what the tile needs, and hands it to the link; it goes on with
    its next tile, which it hands on once the link is through with the one before.

    Args:
        work: That of each rank, in its order: number i goes to core i % cores.

    Raises:
        ValueError: Ranks wait for each other without end.
    """
    schedule = Schedule(0.0)
    arrived: dict[tuple[int, int], float] = {}
    # Of each core: the number that it is at, when it is free, and when its buffer is.
    queues = {
        (rank, core): list(range(core, len(own), machine.cores))
        for rank, own in enumerate(work)
        for core in range(min(machine.cores, len(own)))
    }
    buffers = dict.fromkeys(queues, 0.0)
    links: dict[tuple[int, int], float] = {}
    computed: dict[tuple[int, int], tuple[float, float]] = {}
    # By time: cores whose tile is computed and has to be handed on.
    ready: list[tuple[float, int, int]] = []
    waiting: list[tuple[float, int, int]] = []

    def begin(rank: int, core: int, time: float) -> None:
        if queues[rank, core]:
            number = queues[rank, core][0]
            end = time + work[rank][number].compute
            computed[rank, number] = (time, end)
            heapq.heappush(ready, (end, rank, core))

    for rank, core in queues:
        begin(rank, core, machine.start)
    while ready or waiting:
        if not ready:
            raise ValueError("ranks wait for each other without end")
        time, rank, core = heapq.heappop(ready)
        number = queues[rank, core][0]
        item = work[rank][number]
        if any(need not in arrived for need in item.needs):
            waiting.append((time, rank, core))
            continue
        queues[rank, core].pop(0)
        start, end = computed[rank, number]
        schedule.spans.append(Span(rank, number, "compute", start, end))
        room = 0.0 if machine.queues else buffers[rank, core]
        given = max([time, room, *(arrived[need] for need in item.needs)])
        done = given
        for other, size in item.sends:
            free = max(given, links.get((rank, other), 0.0))
            links[rank, other] = free + size / machine.link
            done = max(done, links[rank, other])
            schedule.spans.append(Span(rank, number, "send", free, links[rank, other]))
        buffers[rank, core] = done
        arrived[rank, number] = done + machine.signal if item.sends else done
        schedule.seconds = max(schedule.seconds, arrived[rank, number])
        begin(rank, core, given)
        for entry in list(waiting):
            _, other_rank, other_core = entry
            needs = work[other_rank][queues[other_rank, other_core][0]].needs
            if all(need in arrived for need in needs):
                waiting.remove(entry)
                heapq.heappush(ready, entry)
    schedule.spans.sort(key=lambda span: span.begin)
    return schedule


def tiles_of_ranks(tiles: int, ranks: int, compute: float, size: float) -> list[list[Work]]:
    """Return the work of a linear whose tiles are shared out to the ranks that sum them.

    A rank computes the tiles of the rank behind it first, and its own last, as the kernels do.

    Args:
        tiles: Of the whole output.
        compute, size: Seconds and bytes of a tile.
    """
    share = -(-tiles // ranks)
    orders = [[(((rank + 1) % ranks) * share + step) % tiles for step in range(tiles)]
              for rank in range(ranks)]  # fmt: skip
    places = [{tile: number for number, tile in enumerate(order)} for order in orders]
    work: list[list[Work]] = []
    for rank, order in enumerate(orders):
        others = [other for other in range(ranks) if other != rank]
        own: list[Work] = []
        for tile in order:
            owner = tile // share
            if owner != rank:
                own.append(Work(compute, ((owner, size),)))
            else:
                needs = tuple((other, places[other][tile]) for other in others)
                own.append(Work(compute, tuple((other, size) for other in others), needs))
        work.append(own)
    return work
