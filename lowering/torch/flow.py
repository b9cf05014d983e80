"""How values flow between the calls of a program, and which calls a loop can run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from graphopt.ir.graph import Program


@dataclass(eq=False)
class Carried:
    """A value of the program.

    Attributes:
        name: Its name in the program; several values may have one name, one after the other.
        made: Number of the call that makes it; -1 for an input.
        uses: Numbers of the calls that read it; for an output, also the number of calls.
    """

    name: str
    made: int
    uses: list[int] = field(default_factory=list)

    @property
    def last_use(self) -> int:
        return max(self.uses, default=-1)


class Flow:
    """The values of a program, by the place where each is made and read.

    Attributes:
        inputs: By name.
        args: For every call, what it reads.
        results: For every call, what it makes.
        output: The logits.
    """

    def __init__(self, program: Program) -> None:
        self.inputs = {name: Carried(name, -1) for name in program.inputs}
        self.args: list[list[Carried]] = []
        self.results: list[list[Carried]] = []
        current = dict(self.inputs)
        for number, call in enumerate(program.calls):
            self.args.append([current[name] for name in call.args])
            for value in self.args[-1]:
                value.uses.append(number)
            self.results.append([Carried(name, number) for name in call.results])
            current.update(zip(call.results, self.results[-1], strict=True))
        self.output = current[program.outputs[0]]
        self.output.uses.append(len(program.calls))


@dataclass
class CallRun:
    """Calls one after the other that one statement, or one loop, makes.

    Attributes:
        first, last: Numbers of the calls.
        lead, tail: The first and last arguments, which every call of the run has: a value, or
            the number of a result that the call before it made.
        varying: For every call, the arguments between those; all of them older than the run.
        initial: For each carried result, what the first call takes in its place.
    """

    first: int
    last: int
    lead: list[Carried | int]
    tail: list[Carried | int] = field(default_factory=list)
    varying: list[list[Carried]] = field(default_factory=list)
    initial: dict[int, Carried] = field(default_factory=dict)

    @property
    def calls(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def fixed(self) -> list[Carried]:
        """What every call of the run reads unchanged."""
        return [item for item in (*self.lead, *self.tail) if isinstance(item, Carried)]


def find_runs(flow: Flow, program: Program, alike: Callable[[str, str], bool]) -> list[CallRun]:
    """Divide the calls of a program into runs that are as long as possible.

    Args:
        alike: True for two functions whose calls look the same but for their arguments.
    """
    runs: list[CallRun] = []
    first = 0
    while first < len(program.calls):
        run = CallRun(first, first, list(flow.args[first]))
        for last in range(first + 1, len(program.calls)):
            ours, theirs = program.calls[first], program.calls[last]
            same = ours.function == theirs.function or (
                _is_layer(ours.path, theirs.path) and alike(ours.function, theirs.function)
            )
            longer = _loop(flow, first, last) if same else None
            if longer is None:
                break
            run = longer
        runs.append(run)
        first = run.last + 1
    return runs


def _is_layer(path: str, other: str) -> bool:
    """True for paths that differ in a number alone, as those of layers do."""
    stems = [re.sub(r"\d+", "#", text) for text in (path, other)]
    return "#" in stems[0] and stems[0] == stems[1]


def _loop(flow: Flow, first: int, last: int) -> CallRun | None:
    """Return the calls from `first` to `last` as one run; None if no loop does what they do."""
    for number in range(first, last):
        for value in flow.results[number]:
            if any(use != number + 1 for use in value.uses):
                return None
    rows: list[list[Carried | int]] = []
    for number in range(first + 1, last + 1):
        made = flow.results[number - 1]
        rows.append([made.index(v) if v in made else v for v in flow.args[number]])
    run = CallRun(first, last, [])
    start = flow.args[first]
    run.lead = _shared(rows, start, run.initial)
    skip = len(run.lead)
    backwards = _shared([r[skip:][::-1] for r in rows], start[skip:][::-1], run.initial)
    run.tail = backwards[::-1]
    stop = len(run.tail)
    every: list[Sequence[Carried | int]] = [start, *rows]
    for row in every:
        middle = row[skip : len(row) - stop]
        if not all(isinstance(item, Carried) for item in middle):
            return None
        run.varying.append([item for item in middle if isinstance(item, Carried)])
    return run


def _shared(
    rows: Sequence[Sequence[Carried | int]], start: Sequence[Carried], initial: dict[int, Carried]
) -> list[Carried | int]:
    """Return the items with which all rows begin, and the first call's arguments as well.

    `initial` gets what the first call has where the others have a carried result.
    """
    shared: list[Carried | int] = []
    for item, *others in zip(*rows, strict=False):
        if len(shared) == len(start) or any(other != item for other in others):
            break
        own = start[len(shared)]
        before = initial.get(item, own) if isinstance(item, int) else item
        if own is not before:
            break
        if isinstance(item, int):
            initial[item] = own
        shared.append(item)
    return shared
