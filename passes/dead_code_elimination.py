"""Removal of what nothing reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.ir.dead_code import remove_dead
from graphopt.ir.graph import Call, Param, Program
from graphopt.pass_manager.contract import Context, Pass, PassResult, register_pass
from graphopt.report.record import Record
from graphopt.rewrite import calls_of


class Removed(Record):
    """How many there were of what was removed, by kind, over all calls."""

    removed: dict[str, int]


@register_pass
@dataclass
class DeadCodeElimination(Pass):
    """Remove nodes, weight slots, carried values, functions, weights and states nothing reads.

    Legality:

    1. A node goes when no result, KV cache and living node reads any of its outputs.
    2. A carried value goes when, in every call of the function, no later call reads it before
       it is made anew, and it is no output of the program.
    3. A parameter goes with its arguments when nothing in its function reads it.
    4. The inputs of the program stay, read or not: they are its contract with runtimes.
    """

    name: ClassVar[str] = "dead-code-elimination"
    takes_ranks: ClassVar[bool] = True
    record: ClassVar[type[Record]] = Removed

    def run(self, program: Program, context: Context) -> PassResult:
        removed: dict[str, int] = {}

        def count(kind: str, number: int) -> None:
            if number:
                removed[kind] = removed.get(kind, 0) + number

        again = True
        while again:
            before = sum(removed.values())
            count("calls", _drop_unread_calls(program))
            calls = calls_of(program)
            count("results", _drop_unread_results(program, calls))
            for name, function in program.functions.items():
                slots = len(function.weights)
                count("nodes", remove_dead(function) * len(calls[name]))
                count("weight slots", (slots - len(function.weights)) * len(calls[name]))
            count("parameters", _drop_unread_parameters(program, calls))
            count("attributes", _drop_unread_attributes(program, calls))
            count("functions", len(program.functions))
            count("weights", len(program.weights))
            count("states", len(program.states))
            program.prune_unused()
            count("functions", -len(program.functions))
            count("weights", -len(program.weights))
            count("states", -len(program.states))
            again = sum(removed.values()) > before
        removed = {kind: number for kind, number in removed.items() if number}
        total = sum(removed.values())
        return PassResult(program, total, total, record=Removed(removed=removed))


def _drop_unread_calls(program: Program) -> int:
    """Delete calls none of whose results is read and that write no state."""
    live = set(program.outputs)
    kept: list[Call] = []
    for call in reversed(program.calls):
        if live & set(call.results) or call.caches:
            live -= set(call.results)
            live |= set(call.args)
            kept.append(call)
    dropped = len(program.calls) - len(kept)
    program.calls = kept[::-1]
    return dropped


def _drop_unread_results(program: Program, calls: dict[str, list[Call]]) -> int:
    """Delete the results of a function that no call needs; return how many over all calls."""
    needed: dict[str, set[int]] = {name: set() for name in program.functions}
    live = set(program.outputs)
    for call in reversed(program.calls):
        needed[call.function] |= {i for i, name in enumerate(call.results) if name in live}
        live -= set(call.results)
        live |= set(call.args)
    dropped = 0
    for name, function in program.functions.items():
        keep = sorted(needed[name])
        dropped += (len(function.results) - len(keep)) * len(calls[name])
        function.results = [function.results[i] for i in keep]
        for call in calls[name]:
            call.results = [call.results[i] for i in keep]
    return dropped


def _drop_unread_parameters(program: Program, calls: dict[str, list[Call]]) -> int:
    dropped = 0
    for name, function in program.functions.items():
        read = function.outside_values()
        read.update(v for node in function.nodes for v in node.inputs if v is not None)
        keep = [i for i, value in enumerate(function.params) if value in read]
        dropped += (len(function.params) - len(keep)) * len(calls[name])
        function.params = [function.params[i] for i in keep]
        for call in calls[name]:
            call.args = [call.args[i] for i in keep]
    return dropped


def _drop_unread_attributes(program: Program, calls: dict[str, list[Call]]) -> int:
    dropped = 0
    for name, function in program.functions.items():
        mentioned = {
            value.name
            for node in function.nodes
            for value in node.attrs.values()
            if isinstance(value, Param)
        }
        for call in calls[name]:
            dropped += len(set(call.attrs) - mentioned)
            call.attrs = {key: value for key, value in call.attrs.items() if key in mentioned}
    return dropped
