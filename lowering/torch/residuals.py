"""The sum at the end of a layer, moved to the norm at the start of the next one.

A kernel that norms a sum writes the sum as well. Where they are in two functions, the layer hands
its two summands on, and the function that norms them adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import networkx

from graphopt.ir.graph import Function, Node, Program, Value
from graphopt.lowering.torch.flow import Flow
from graphopt.pass_manager.contract import Context, Pass, PassResult

_Place = tuple[str, str, int]
"""A function, `param` or `result`, and its number; a function without a name is the outside."""


@dataclass
class DeferResidualAdds(Pass):
    """Take every sum that one call makes and the next one norms apart, and add it up there.

    Legality:

    1. Every function that reads such a value takes its RMS norm first, by a weight of its own.
    2. One of those that make it ends with a sum that nothing else reads; another hands on
       `no_addend` as the second summand.
    3. Each is read by one call alone, and is no input or output of the program.
    """

    name: ClassVar[str] = "defer-residual-adds"
    takes_ranks: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> PassResult:
        graph: networkx.Graph[_Place] = networkx.Graph(_edges(program))
        matched, deferred = 0, []
        for connected in networkx.connected_components(graph):
            makers = {place for place in connected if place[1] == "result"}
            readers = connected - makers
            if not any(_sum_of(program.functions[name], index) for name, _, index in makers):
                continue
            matched += 1
            if all(_norms(program, place) for place in readers):
                deferred.append((makers, readers))
        numbers = _Numbers()
        for makers, readers in deferred:
            for place in sorted(readers):
                _read_two(program, place, numbers)
            for place in sorted(makers):
                _make_two(program, place, numbers)
        return PassResult(program, matched, len(deferred))


class _Numbers:
    """Where parameters and results are that the pass has moved, by their numbers before it."""

    def __init__(self) -> None:
        self._inserted: dict[tuple[str, str], list[int]] = {}

    def now(self, place: _Place) -> int:
        name, side, old = place
        return old + sum(other < old for other in self._inserted.get((name, side), ()))

    def insert_behind(self, place: _Place) -> None:
        name, side, old = place
        self._inserted.setdefault((name, side), []).append(old)


def _edges(program: Program) -> list[tuple[_Place, _Place]]:
    """Return which results of functions are which parameters of others.

    What else reads or makes one of these is the outside, which norms nothing.
    """
    flow = Flow(program)
    outside = ("", "param", 0)
    edges: list[tuple[_Place, _Place]] = []
    for number, call in enumerate(program.calls):
        for index, value in enumerate(flow.args[number]):
            if value.made < 0:
                edges.append((outside, (call.function, "param", index)))
        for index, value in enumerate(flow.results[number]):
            place = (call.function, "result", index)
            if not value.uses:
                continue
            reader = value.uses[0]
            if len(value.uses) > 1 or reader == len(program.calls):
                edges.append((place, outside))
                continue
            argument = flow.args[reader].index(value)
            edges.append((place, (program.calls[reader].function, "param", argument)))
    return edges


def _norms(program: Program, place: _Place) -> bool:
    """Return whether a function takes the norm of a parameter, by a weight of its own or none."""
    name, _, index = place
    if not name:
        return False
    function = program.functions[name]
    weights = set(function.weights.values())
    return any(
        node.op == "rms_norm"
        and node.inputs[0] is function.params[index]
        and all(weight is None or weight in weights for weight in node.inputs[1:])
        for node in function.nodes
    )


def _sum_of(function: Function, index: int) -> Node | None:
    """Return the sum that a result is, if nothing else needs it."""
    value = function.results[index]
    outside = [*function.results, *(v for c in function.caches for v in c.presents)]
    if value.node is None or value.node.op != "add":
        return None
    alone = not function.uses()[value] and sum(v is value for v in outside) == 1
    return value.node if alone else None


def _read_two(program: Program, place: _Place, numbers: _Numbers) -> None:
    """Make a function take the summands of a parameter, and add them up before all else."""
    name, index = place[0], numbers.now(place)
    function = program.functions[name]
    x = function.params[index]
    delta = Value(f"{x.name}_delta")
    total = function.add("add", [x, delta], names=["total"], before=function.nodes[0])
    function.replace(x, total.output)
    total.inputs = [x, delta]
    function.params.insert(index + 1, delta)
    for call in program.calls:
        if call.function == name:
            call.args.insert(index + 1, f"{call.args[index]}_delta")
    numbers.insert_behind(place)


def _make_two(program: Program, place: _Place, numbers: _Numbers) -> None:
    """Make a function return the summands of a result."""
    name, index = place[0], numbers.now(place)
    function = program.functions[name]
    last = _sum_of(function, index)
    if last is None:
        nothing = function.add("no_addend", [function.results[index]], names=["delta"])
        function.results.insert(index + 1, nothing.output)
    else:
        function.results[index : index + 1] = [v for v in last.inputs if v is not None]
        function.nodes.remove(last)
    for call in program.calls:
        if call.function == name:
            call.results.insert(index + 1, f"{call.results[index]}_delta")
    numbers.insert_behind(place)
