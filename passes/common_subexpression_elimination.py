"""Computing equal things once."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from graphopt.ir.graph import Call, Function, Program, Value, unique_name
from graphopt.ir.ops.aten import is_random
from graphopt.pass_manager.contract import Context, Pass, PassResult, register_pass
from graphopt.report.record import Record
from graphopt.rewrite import calls_of, merge_equal_nodes


class Merged(Record):
    """How many were merged into an equal one, by kind, over all calls."""

    merged: dict[str, int]


@register_pass
@dataclass
class CommonSubexpressionElimination(Pass):
    """Merge equal nodes of a function, equal calls of a program, and what they carry.

    Legality:

    1. Two nodes are equal if op, attributes and operands are; for sums and products in either
       order. An operator that draws random numbers equals no other.
    2. Two weight slots are equal if every call of the function puts one weight in both.
    3. Two calls are equal if function, arguments, weights and attributes are, and neither
       holds a KV cache.
    4. Two parameters are equal if every call passes one value for both.
    """

    name: ClassVar[str] = "common-subexpression-elimination"
    takes_ranks: ClassVar[bool] = True
    record: ClassVar[type[Record]] = Merged

    def run(self, program: Program, context: Context) -> PassResult:
        merged: dict[str, int] = {}
        again = True
        while again:
            before = sum(merged.values())
            names = _single_assignment(program)
            calls = calls_of(program)
            found = {"calls": _merge_calls(program)}
            for name, function in program.functions.items():
                times = len(calls[name])
                for kind, count in (
                    ("parameters", _merge_parameters(function, calls[name])),
                    ("weight slots", _merge_slots(function, calls[name])),
                    ("nodes", merge_equal_nodes(function)),
                ):
                    found[kind] = found.get(kind, 0) + count * times
            found["carried values"] = _merge_results(program)
            _restore_names(program, names)
            for kind, count in found.items():
                if count:
                    merged[kind] = merged.get(kind, 0) + count
            again = sum(merged.values()) > before
        total = sum(merged.values())
        return PassResult(program, total, total, record=Merged(merged=merged))


def _merge_slots(function: Function, calls: list[Call]) -> int:
    first: dict[tuple[str, ...], str] = {}
    merged = 0
    for slot in list(function.weights):
        key = tuple(call.weights[slot] for call in calls)
        earlier = first.setdefault(key, slot)
        if not calls or earlier == slot:
            continue
        function.replace(function.weights.pop(slot), function.weights[earlier])
        for call in calls:
            del call.weights[slot]
        merged += 1
    return merged


def _merge_parameters(function: Function, calls: list[Call]) -> int:
    first: dict[tuple[str, ...], Value] = {}
    keep: list[int] = []
    for index, value in enumerate(function.params):
        earlier = first.setdefault(tuple(call.args[index] for call in calls), value)
        if not calls or earlier is value:
            keep.append(index)
        else:
            function.replace(value, earlier)
    merged = len(function.params) - len(keep)
    function.params = [function.params[i] for i in keep]
    for call in calls:
        call.args = [call.args[i] for i in keep]
    return merged


def _merge_calls(program: Program) -> int:
    """Delete calls equal to an earlier one; needs every program value to be made once."""
    first: dict[Hashable, Call] = {}
    alias: dict[str, str] = {}
    kept: list[Call] = []
    for call in program.calls:
        call.args = [alias.get(name, name) for name in call.args]
        key = (
            call.function,
            tuple(call.args),
            tuple(sorted(call.weights.items())),
            repr(sorted(call.attrs.items())),
        )
        single = bool(call.caches) or bool(set(call.results) & set(program.outputs))
        single |= any(is_random(node) for node in program.functions[call.function].nodes)
        earlier = call if single else first.setdefault(key, call)
        if earlier is call:
            kept.append(call)
        else:
            alias.update(zip(call.results, earlier.results, strict=True))
    merged = len(program.calls) - len(kept)
    program.calls = kept
    return merged


def _merge_results(program: Program) -> int:
    """Make readers of a value that a call returns twice, or hands through, read the first name."""
    alias: dict[str, str] = {}
    merged: set[str] = set()
    for call in program.calls:
        merged |= alias.keys() & set(call.args)
        call.args = [alias.get(name, name) for name in call.args]
        function = program.functions[call.function]
        names = dict(zip(function.params, call.args, strict=True))
        for value, name in zip(function.results, call.results, strict=True):
            earlier = names.setdefault(value, name)
            if earlier != name and name not in program.outputs:
                alias[name] = earlier
    return len(merged)


def _single_assignment(program: Program) -> dict[str, str]:
    """Rename program values so that each is made once; return new name -> old name."""
    current = {name: name for name in program.inputs}
    original = dict(current)
    for call in program.calls:
        call.args = [current[name] for name in call.args]
        for index, name in enumerate(call.results):
            unique = unique_name(name, set(original))
            original[unique] = name
            current[name] = call.results[index] = unique
    program.outputs = [current[name] for name in program.outputs]
    return original


def _restore_names(program: Program, original: dict[str, str]) -> None:
    """Give values their old names back, but never one name to two that are alive together."""
    end = len(program.calls)
    dies = dict.fromkeys(program.outputs, end)
    born = dict.fromkeys(program.inputs, -1)
    for index, call in enumerate(program.calls):
        for name in call.args:
            dies[name] = max(dies.get(name, -1), index)
        born.update((name, index) for name in call.results)
    # The names of the outputs are the program's contract: others step aside for them.
    reserved = {original[name]: name for name in program.outputs}
    current = {name: name for name in program.inputs}
    bearer = dict(current)

    def is_free(name: str, value: str, index: int) -> bool:
        owner = reserved.get(name, value)
        if owner != value and dies.get(value, -1) > born[owner]:
            return False
        other = bearer.get(name)
        return other is None or (dies.get(other, -1) <= index and born[other] < index)

    for index, call in enumerate(program.calls):
        call.args = [current[name] for name in call.args]
        for position, value in enumerate(call.results):
            wanted = original[value]
            names = itertools.chain([wanted], (f"{wanted}_{i}" for i in itertools.count(1)))
            name = next(name for name in names if is_free(name, value, index))
            bearer[name] = value
            current[value] = call.results[position] = name
    program.outputs = [current[name] for name in program.outputs]
