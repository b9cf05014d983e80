"""Applying rules to a function until none applies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from graphopt.ir.dead_code import dead_nodes, remove_newly_dead
from graphopt.ir.graph import Call, Function, Program, Value
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type
from graphopt.rewrite.rule import Match, NoMatch, Rule, Site


def calls_of(program: Program) -> dict[str, list[Call]]:
    """Return the calls of every function, by the function's name."""
    calls: dict[str, list[Call]] = {name: [] for name in program.functions}
    for call in program.calls:
        calls[call.function].append(call)
    return calls


def types_of(program: Program) -> dict[str, list[dict[Value, Type]]]:
    """Return, for every function, the types of its values in each distinct kind of call."""
    per_call, _ = infer_program(program)
    types: dict[str, list[dict[Value, Type]]] = {name: [] for name in program.functions}
    for call, values in zip(program.calls, per_call, strict=True):
        known = types[call.function]
        if not any(values is other for other in known):
            known.append(values)
    return types


@dataclass
class Rewritten:
    """What rules did to a function.

    Attributes:
        counts: How often each rule that applied did, by name.
        refused: Where rules did not apply to the function as it is now: (rule, reason and node).
    """

    counts: dict[str, int] = field(default_factory=dict)
    refused: list[tuple[str, NoMatch]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def apply_rules(
    function: Function,
    rules: Sequence[Rule],
    calls: Sequence[Call] = (),
    types: Sequence[dict[Value, Type]] = (),
) -> Rewritten:
    """Apply rules in place until none applies; of several that would, the first one does.

    Nodes are visited in their order, and those that nothing reads are left alone. What the rules
    make unread is removed; what was unread before stays.

    Args:
        calls: The calls of the function, for rules that ask for attributes.
        types: The types of its values in each distinct kind of call, for rules that ask for them.
    """
    result = Rewritten()
    unread_before = dead_nodes(function)
    dead = set(map(id, unread_before))
    again = True
    while again:
        again = False
        result.refused = []
        order, uses, outside = _order(function), function.uses(), function.outside_values()
        for node in list(function.nodes):
            if id(node) in dead or node not in function.nodes:
                continue
            for candidate in rules:
                if candidate.ops and node.op not in candidate.ops:
                    continue
                outcome = candidate(Site(node, function, calls, types, order, uses, outside))
                if isinstance(outcome, Match):
                    outcome.rewrite()
                    result.counts[candidate.name] = result.counts.get(candidate.name, 0) + 1
                    again = True
                    dead |= set(map(id, dead_nodes(function)))
                    uses, outside = function.uses(), function.outside_values()
                    break
                result.refused.append((candidate.name, outcome))
    remove_newly_dead(function, unread_before)
    return result


def _order(function: Function) -> dict[Value, int]:
    """Rank of every value: parameters, node outputs as they are made, then weights."""
    values = list(function.params)
    for cache in function.caches:
        values += cache.pasts
    for node in function.nodes:
        values += node.outputs
    values += function.weights.values()
    return {value: rank for rank, value in enumerate(values)}
