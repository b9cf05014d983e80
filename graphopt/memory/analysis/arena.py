"""Where the blocks of a trace would lie in one arena."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphopt.memory.analysis.summary import ALIGNMENT
from graphopt.memory.planning import Problem, plan_offsets
from graphopt.memory.trace import Trace

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Arena:
    """A plan for blocks of a trace: all, or some, those that existed before included.

    Attributes:
        offsets: int64 [instances], bytes; -1 for blocks without bytes, or left out.
        height: Bytes of the arena.
        bound: Bytes that no arena can do without.
    """

    offsets: Int64
    height: int
    bound: int


def plan_arena(trace: Trace, seconds: float, of: npt.NDArray[np.bool_] | None = None) -> Arena:
    """Return a plan of offsets for a trace, in multiples of what torch's allocator rounds to.

    Args:
        seconds: How long to look for a better one.
        of: Which instances, bool [instances]; by default all.
    """
    sized = trace.sizes > 0
    lives = trace.lifetimes(sized if of is None else sized & of)
    # A block that was alive when the trace ended lives behind its last event.
    upper = np.maximum(lives.upper, lives.lower + 1)
    ids = [str(i) for i in lives.instance.tolist()]
    problem = Problem(ids, lives.lower, upper, lives.size, ALIGNMENT)
    plan = plan_offsets(problem, seconds=seconds)
    offsets = np.full(len(trace.instances), -1, np.int64)
    offsets[lives.instance] = plan.offsets
    return Arena(offsets, plan.height, plan.bound)
