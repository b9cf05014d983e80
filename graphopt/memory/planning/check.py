"""An independent check of a plan: by time alone, with no code of the planner."""

from __future__ import annotations

import bisect

from graphopt.errors import VerifyError
from graphopt.memory.planning.problem import Int64, Problem
from graphopt.support.plain import shown


def check_offsets(problem: Problem, offsets: Int64, capacity: int | None = None) -> int:
    """Return the height of a plan: the largest end of a block that takes room.

    Events are gone through in order of time, ends before beginnings, with the list of what is alive
    in order of offsets: a new block must lie between its neighbours.

    Raises:
        VerifyError: Two blocks that are alive at once overlap, an offset is negative or no multiple
            of the alignment, or a block ends above `capacity`.
    """
    if len(offsets) != len(problem):
        raise VerifyError(f"{len(offsets)} offsets for {len(problem)} blocks.")
    rows = list(
        zip(
            problem.lower.tolist(),
            problem.upper.tolist(),
            problem.size.tolist(),
            offsets.tolist(),
            strict=True,
        )
    )
    events: list[tuple[int, int, int]] = []
    height = 0
    for block, (lower, upper, size, offset) in enumerate(rows):
        if offset < 0 or offset % problem.alignment:
            raise VerifyError(
                f"Block {shown(problem.ids[block])} lies at {offset}, which is no multiple of "
                f"{problem.alignment} from 0 up."
            )
        if size == 0 or lower == upper:
            continue
        height = max(height, offset + size)
        if capacity is not None and offset + size > capacity:
            raise VerifyError(
                f"Block {shown(problem.ids[block])} ends at {offset + size}, above {capacity}."
            )
        events += [(lower, 1, block), (upper, 0, block)]
    alive: list[tuple[int, int, int]] = []  # offset, end, block
    for time, begins, block in sorted(events):
        _, _, size, offset = rows[block]
        here = (offset, offset + size, block)
        place = bisect.bisect_left(alive, here)
        if not begins:
            del alive[place]
            continue
        for other in alive[max(place - 1, 0) : place + 1]:
            if other[0] < here[1] and here[0] < other[1]:
                raise VerifyError(
                    f"Blocks {shown(problem.ids[block])} and {shown(problem.ids[other[2]])} are "
                    f"both alive at {time}, and overlap: [{here[0]}, {here[1]}) and "
                    f"[{other[0]}, {other[1]})."
                )
        alive.insert(place, here)
    return height
