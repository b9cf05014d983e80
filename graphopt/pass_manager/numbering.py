"""Value numbers: what shows that two programs compute the same thing without running them.

An expression's number stands for its operator, its attributes and the numbers of its operands, and
a weight's for what makes its value. Equal numbers are a proof, for all tokens, positions and
lengths; other numbers prove nothing. `a + b` and `b + a` have one number, since they round alike;
no other law of arithmetic is used.

Source: Cocke and Schwartz, Programming Languages and Their Compilers, 1970 (value numbering).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from graphopt.ir.graph import Call, Function, Program, Value, resolve_attrs
from graphopt.ir.imprint import producer_key, same_producer
from graphopt.ir.ops import COMMUTATIVE, get_op, is_aten
from graphopt.ir.ops.aten import is_random
from graphopt.ir.weights import Weight

Past = tuple[int, ...]
"""Numbers of what an attention finds in a cache, or leaves there: keys, values, policy's state."""


@dataclass(frozen=True)
class Numbered:
    """What one call makes.

    Attributes:
        values: The number of every value of its function.
        results: Numbers of its results, in the function's order.
        caches: By the function's cache slot, what it leaves there.
    """

    values: dict[Value, int]
    results: list[int]
    caches: dict[str, Past]


class ValueNumbers:
    """Numbers of expressions, common to the programs that are compared.

    The programs must be kept alive: large tensors in memory are told apart by identity.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._weights: dict[str, list[Weight]] = {}

    def of(self, *key: Hashable) -> int:
        """Return the number of what has this key, a new one for a new key."""
        return self._numbers.setdefault(key, len(self._numbers))

    def weight(self, weight: Weight) -> int:
        """Return the number of a weight's value, as the call that reads it sees it."""
        known = self._weights.setdefault(weight.name, [])
        for other in known:
            if same_producer(other.producer, weight.producer):
                return self.of("weight", producer_key(other.producer))
        known.append(weight)
        return self.of("weight", producer_key(weight.producer))

    def call(
        self,
        program: Program,
        call: Call,
        args: Sequence[int],
        *,
        weights: dict[str, int] | None = None,
        without_past: bool = False,
        instead: dict[Value, Value] | None = None,
    ) -> Numbered:
        """Number what a call makes of arguments with the numbers `args`.

        Args:
            weights: Numbers of weight slots, where they are not the weights' own.
            without_past: Number the step of an empty cache: an attention then is the same as one
                without a cache, and what it leaves are its own keys and values.
            instead: Values whose readers read another one.
        """
        function = program.functions[call.function]
        values: dict[Value, int] = dict(zip(function.params, args, strict=True))
        for slot, value in function.weights.items():
            given = None if weights is None else weights.get(slot)
            own = program.weights[call.weights[slot]]
            values[value] = self.weight(own) if given is None else given
        for cache in function.caches:
            state = call.caches.get(cache.slot, cache.slot)
            values |= {v: self.of("past", n, state) for n, v in enumerate(cache.pasts)}
        self._nodes(function, call, values, without_past, instead or {})
        left = {c.slot: tuple(values[v] for v in c.presents) for c in function.caches}
        return Numbered(values, [values[value] for value in function.results], left)

    def _nodes(
        self,
        function: Function,
        call: Call,
        values: dict[Value, int],
        without_past: bool,
        instead: dict[Value, Value],
    ) -> None:
        pasts = {value for c in function.caches for value in c.pasts}
        for node in function.nodes:
            read = [None if v is None else instead.get(v, v) for v in node.inputs]
            cached = without_past and any(value in pasts for value in read)
            if cached:
                read = [None if value in pasts else value for value in read]
            operands = [None if value is None else values[value] for value in read]
            while operands and operands[-1] is None:
                operands.pop()
            if node.op in COMMUTATIVE:
                operands.sort(key=lambda number: -1 if number is None else number)
            attrs = {**get_op(node.op).defaults, **resolve_attrs(node, call)}
            if is_aten(node.op):
                attrs.pop("types", None)
            described = tuple((key, repr(attrs[key])) for key in sorted(attrs))
            random: Hashable = (id(node), id(call)) if is_random(node) else None
            for index, value in enumerate(node.outputs):
                place = index
                if cached and node.op == "attention":
                    if index in (1, 2):
                        values[value] = self.of("kept", operands[index], attrs["ring"])
                        continue
                    place = max(index - 2, 0)
                values[value] = self.of(node.op, tuple(operands), described, random, place)


def number_program(
    numbers: ValueNumbers, program: Program, *, without_past: bool = False
) -> tuple[list[int], dict[str, Past]]:
    """Return the numbers of a program's outputs, and of what it leaves in each of its states."""
    carried = {name: numbers.of("input", name) for name in program.inputs}
    states: dict[str, Past] = {}
    for call in program.calls:
        made = numbers.call(
            program, call, [carried[name] for name in call.args], without_past=without_past
        )
        carried.update(zip(call.results, made.results, strict=True))
        states.update({call.caches[slot]: past for slot, past in made.caches.items()})
    return [carried[name] for name in program.outputs], states


def same_outputs(before: Program, after: Program, *, without_past: bool = False) -> bool:
    """Return whether two programs are proved to give the same outputs, and to keep the same states.

    Args:
        without_past: Prove it for steps without tokens in the caches alone, whatever is kept.
    """
    numbers = ValueNumbers()
    first, kept = number_program(numbers, before, without_past=without_past)
    second, left = number_program(numbers, after, without_past=without_past)
    if first != second:
        return False
    same_states = list(before.states.items()) == list(after.states.items())
    return without_past or (kept == left and same_states)
