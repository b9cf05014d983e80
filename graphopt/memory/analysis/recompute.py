"""Blocks that could be dropped and computed again: what that costs, and what it needs.

A block is computed again by the operation that made it, right before it is read again. What that
operation reads has to be alive then, or is computed again first: the cost is that of the chain.
Nothing in a chain may draw random numbers, and nothing may have been written twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphopt.memory.analysis.intervals import Intervals
from graphopt.memory.trace import MALLOC, READ, WRITE, Trace

Int64 = npt.NDArray[np.int64]

LONGEST_CHAIN = 16
"""Operations that are run again for one block, at most."""

_RANDOM = re.compile(
    r"rand|dropout|rrelu|bernoulli|binomial|multinomial|poisson|normal|uniform|exponential|gamma|"
    r"dirichlet|geometric|cauchy"
)
_NOT_RANDOM = re.compile(
    r"batch_norm|layer_norm|group_norm|rms_norm|normalize|renorm|_norm|(l|poly|di)gamma"
)


@dataclass(frozen=True)
class Recompute:
    """A block that is dropped after an access and computed again before the next.

    Attributes:
        instance: Index of the instance.
        first, second: Events of the accesses between which it is away.
        size: Bytes.
        cost: Time of the operations that are run again, in units of the trace's clock.
        chain: The instances that are computed again in order; the last is the block itself.
        extra: Bytes of the others in the chain, which are alive while it is computed.
        needs: The instances that are alive then and read by the chain.
    """

    instance: int
    first: int
    second: int
    size: int
    cost: int
    chain: tuple[int, ...]
    extra: int
    needs: frozenset[int]


@dataclass
class _Makers:
    """Who made each block, of what, and how often it was written."""

    call: Int64
    cost: Int64
    inputs: dict[int, list[int]]
    writes: list[list[int]]
    random: npt.NDArray[np.bool_]


def call_times(trace: Trace) -> Int64:
    """Return how long each call took, int64 [calls]: until the next one began."""
    if not len(trace):
        return np.zeros(0, np.int64)
    calls = int(trace.call.max()) + 1
    starts = np.full(calls + 1, int(trace.time_ns[-1]), np.int64)
    known = trace.call >= 0
    numbers, place = np.unique(trace.call[known], return_index=True)
    starts[numbers] = trace.time_ns[known][place]
    # A call without events begins where the next one does.
    starts = np.minimum.accumulate(starts[::-1])[::-1]
    return np.diff(starts)


def recompute_candidates(trace: Trace, intervals: Intervals, *, least: int = 1) -> list[Recompute]:
    """Return intervals of activations in which a block could be dropped, the cheapest first.

    They are ordered by cost for each byte. Intervals that wrap are left out: what lives from one
    period into the next was not computed in it.

    Args:
        least: Bytes of the smallest block that is looked at.
    """
    makers = _makers(trace)
    found = []
    wanted = ~intervals.wraps & (intervals.size >= least)
    for place in np.flatnonzero(wanted).tolist():
        instance = trace.instances[int(intervals.instance[place])]
        if instance.external or instance.category not in ("activation", "other"):
            continue
        first, second = int(intervals.first[place]), int(intervals.second[place])
        if trace.kind[second] != READ or trace.call[second] <= trace.call[first] + 1:
            continue  # nothing is between the accesses
        needs: set[int] = set()
        chain = _chain(trace, makers, instance.index, second, needs)
        if chain is None:
            continue
        calls = {int(makers.call[i]) for i in chain}
        cost = int(sum(makers.cost[c] for c in calls))
        extra = int(sum(trace.sizes[i] for i in chain[:-1]))
        found.append(
            Recompute(
                instance.index,
                first,
                second,
                instance.size,
                cost,
                tuple(chain),
                extra,
                frozenset(needs),
            )
        )
    return sorted(found, key=lambda r: (r.cost / r.size, r.first))


def _makers(trace: Trace) -> _Makers:
    count = len(trace.instances)
    made = np.full(count, -1, np.int64)
    born = np.flatnonzero(trace.kind == MALLOC)
    made[trace.instance[born]] = trace.call[born]
    inputs: dict[int, list[int]] = {}
    makes = set(made.tolist())
    reads = np.flatnonzero(trace.kind == READ)
    for call, owner in zip(trace.call[reads].tolist(), trace.instance[reads].tolist(), strict=True):
        if call in makes:
            inputs.setdefault(call, []).append(owner)
    writes: list[list[int]] = [[] for _ in range(count)]
    places = np.flatnonzero(trace.kind == WRITE)
    for event, owner in zip(places.tolist(), trace.instance[places].tolist(), strict=True):
        writes[owner].append(event)
    is_random = np.array(
        [bool(_RANDOM.search(_NOT_RANDOM.sub("", name))) for name in trace.op_names], bool
    )
    random = np.zeros(count, bool)
    random[trace.instance[born]] = is_random[trace.op[born]]
    return _Makers(made, call_times(trace), inputs, writes, random)


def _chain(trace: Trace, makers: _Makers, index: int, at: int, needs: set[int]) -> list[int] | None:
    """Return what is computed again, in order, for a block at an event; None if that can't be.

    Args:
        needs: Takes the instances that are alive and read.
    """
    order: list[int] = []
    seen: set[int] = set()

    def visit(one: int, since: int | None) -> bool:
        """Have a block at hand that is read by what made a block at event `since`."""
        if one in seen:
            return True
        instance = trace.instances[one]
        alive = (instance.external or instance.born <= at) and (
            instance.died is None or instance.died > at
        )
        written = makers.writes[one]
        if alive and since is not None:
            needs.add(one)
            # It holds what it held then if nothing has been written to it meanwhile.
            return not any(since < event <= at for event in written)
        if instance.external or makers.random[one] or makers.call[one] < 0 or len(written) > 1:
            return False
        if len(seen) >= LONGEST_CHAIN:
            return False
        seen.add(one)
        for needed in makers.inputs.get(int(makers.call[one]), []):
            if not visit(needed, instance.born):
                return False
        order.append(one)
        return True

    return order if visit(index, None) else None
