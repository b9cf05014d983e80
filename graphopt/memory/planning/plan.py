"""A plan of offsets: the best of greedy ones, and an exact search where that is not the bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from graphopt.memory.planning.check import check_offsets
from graphopt.memory.planning.compiled import Found, NoSearch, search
from graphopt.memory.planning.greedy import greedy_plans
from graphopt.memory.planning.problem import Int64, Problem
from graphopt.memory.planning.sections import live_at_peak

SECONDS = 60.0
"""How long a plan is looked for by default."""


class Outcome(Enum):
    """What became of the capacity that was asked for, or of the search for the least one."""

    REACHED = "reached"
    """The plan is within the capacity; without one, no smaller arena exists."""
    INFEASIBLE = "infeasible"
    """No plan is within the capacity: the bound, or an exhausted search, proves it."""
    UNDECIDED = "undecided"
    """Time ran out, or the search cannot run here."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Offsets of blocks in one arena.

    Attributes:
        offsets: int64 [blocks], bytes.
        height: Bytes of the arena: the largest end of a block.
        live: Most bytes alive at once, sizes rounded up to the alignment.
        bound: No arena can have fewer bytes: `live`, or more where a search proved it.
        outcome: What became of the search.
        how: What made the plan.
        notes: What did not run and why, a sentence each.
        seconds: How long it took.
    """

    offsets: Int64
    height: int
    live: int
    bound: int
    outcome: Outcome
    how: str
    notes: tuple[str, ...]
    seconds: float


class _Best:
    """The lowest plan so far, of blocks that take room."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.height: int | None = None
        self.offsets: Int64 = np.zeros(len(problem), np.int64)
        self.how = "nothing to place"

    def offer(self, offsets: Int64, how: str) -> int:
        """Take a plan if it is lower; return its height."""
        height = int((offsets + self.problem.padded).max())
        if self.height is None or height < self.height:
            self.height, self.offsets, self.how = height, offsets, how
        return height


def plan_offsets(
    problem: Problem,
    capacity: int | None = None,
    *,
    seconds: float = SECONDS,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Return a plan of offsets, checked for overlaps.

    Greedy plans come first. If none is within `capacity` (by default the most bytes alive at once),
    an exact search follows. Without a capacity it goes on: targets between what is proved and what
    is found are searched for in turn, until they meet or time runs out.

    Args:
        capacity: Bytes that suffice; None looks for the smallest arena.
        seconds: How long to look.
        threads: How many searches run side by side; by default the cores, 8 at most.
        tell: Takes a line about each step.

    Raises:
        SourceError: See `Problem.check`.
    """
    problem.check()
    began = time.monotonic()
    placed = problem.takes_room
    part = problem.select(placed)
    live = live_at_peak(part)
    goal = live if capacity is None else capacity
    best = _Best(part)
    bound, notes, since = live, [], began
    if len(part):
        # What is left is for ending the search, and for the check.
        deadline = began + 0.97 * seconds
        for how, offsets in greedy_plans(part):
            took, since = time.monotonic() - since, time.monotonic()
            height = best.offer(offsets, how)
            tell(f"{how}: {height} bytes, {height / live:.4f} times the bound")
            if height <= max(goal, live) or since + took > deadline:
                break
        try:
            bound = _searched(best, live, goal, deadline, capacity is None, threads, tell)
        except NoSearch as reason:
            notes.append(str(reason))
    height = best.height or 0
    if height <= goal or (capacity is None and height == bound):
        outcome = Outcome.REACHED
    elif capacity is not None and bound > goal:
        outcome = Outcome.INFEASIBLE
    else:
        outcome = Outcome.UNDECIDED
    offsets = np.zeros(len(problem), np.int64)
    offsets[placed] = best.offsets
    check_offsets(problem, offsets, height)
    return Plan(
        offsets, height, live, bound, outcome, best.how, tuple(notes), time.monotonic() - began
    )


def _searched(
    best: _Best,
    live: int,
    goal: int,
    deadline: float,
    go_on: bool,
    threads: int | None,
    tell: Callable[[str], None],
) -> int:
    """Improve the best plan by exact searches; return the bound that is proved.

    Raises:
        NoSearch: See `search`.
    """
    unit = int(np.gcd.reduce(best.problem.padded))
    proved, target, tries = live, max(goal, live), 0
    while best.height is not None and best.height > max(target, proved):
        left = deadline - time.monotonic()
        if left <= 0 or goal < live:
            break
        # Without a capacity, targets are left behind that take long.
        slice_ = left if not go_on else left / 3
        done = search(best.problem, target, slice_, threads=threads, seed=tries)
        tries += 1
        tell(f"search for {target} bytes: {done.found.name.lower()}, {done.nodes} decisions")
        if done.found is Found.OFFSETS and done.offsets is not None:
            best.offer(done.offsets, "exact search")
        elif done.found is Found.INFEASIBLE:
            # Heights are sums of sizes.
            proved = (target // unit + 1) * unit
        elif done.found is Found.NO_MEMORY:
            raise NoSearch("The exact search ran out of memory.")
        if not go_on:
            break
        target = _next_target(proved, target, best.height, done.found, unit)
    return proved


def _next_target(proved: int, target: int, height: int, found: Found, unit: int) -> int:
    """Return what to search for next: between what is out of reach and the best plan.

    What was not decided in its time counts as out of reach for now; where nothing is left between,
    it begins again at what is proved, with what time is left.
    """
    low = target if found is Found.UNDECIDED else proved
    middle = (low + (height - low) // 2) // unit * unit
    if found is Found.INFEASIBLE:
        return proved
    return middle if low < middle < height else proved
