"""Which calls of two programs do the same work, and which of them have to be run to compare it."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

from graphopt.ir.graph import Program
from graphopt.ir.parts import whole_of
from graphopt.ir.weights import Weight
from graphopt.pass_manager.numbering import Numbered, ValueNumbers


@dataclass(frozen=True)
class Pair:
    """A call before and after, by position; None where there is none.

    Attributes:
        run: Whether it is the first of a kind of calls that changed.
        equal: For each result after that is taken for one before: that one's name.
    """

    before: int | None
    after: int | None
    run: bool
    equal: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """How two programs are compared.

    Attributes:
        pairs: In order of execution.
        changed: How many calls are not proved to be the same.
        complete: Whether equal results of all pairs make equal outputs.
    """

    pairs: list[Pair]
    changed: int
    complete: bool

    @property
    def kinds(self) -> int:
        """How many pairs are run."""
        return sum(pair.run for pair in self.pairs)


def plan_pairs(before: Program, after: Program) -> Plan:
    """Pair the calls of two programs, and find those that changed.

    Results of calls that changed are taken for equal behind them, as they are once they have been
    compared. Calls are of one kind if they differ in nothing but weights that they read before
    and after: what one of them shows of the two functions holds for all.
    """
    programs, numbers = (before, after), ValueNumbers()
    carried = tuple({name: numbers.of("input", name) for name in p.inputs} for p in programs)
    kinds: set[Hashable] = set()
    pairs: list[Pair] = []
    changed = 0
    for i, j in _aligned(before, after):
        made: list[Numbered] = []
        for program, index, known in zip(programs, (i, j), carried, strict=True):
            if index is not None:
                call = program.calls[index]
                made.append(numbers.call(program, call, [known[name] for name in call.args]))
                known.update(zip(call.results, made[-1].results, strict=True))
        if i is None or j is None:
            pairs.append(Pair(i, j, False, {}))
            continue
        first, second = before.calls[i], after.calls[j]
        names = dict(zip(made[0].results, first.results, strict=True))
        if made[0].caches == made[1].caches and names.keys() >= set(made[1].results):
            equal = dict(zip(second.results, (names[x] for x in made[1].results), strict=True))
            pairs.append(Pair(i, j, False, equal))
            continue
        changed += 1
        kind = _kind(numbers, before, after, (i, j), (made[0], made[1]))
        pairs.append(
            Pair(i, j, kind not in kinds, {x: x for x in second.results if x in first.results})
        )
        kinds.add(kind)
        carried[1].update({name: carried[0][name] for name in pairs[-1].equal})
    outputs = [
        [known[name] for name in program.outputs]
        for program, known in zip(programs, carried, strict=True)
    ]
    return Plan(pairs, changed, outputs[0] == outputs[1])


def _aligned(before: Program, after: Program) -> Iterator[tuple[int | None, int | None]]:
    """Yield the calls of two programs in order, those of the same module path together."""
    old, new = ([call.path or call.function for call in p.calls] for p in (before, after))
    i = j = 0
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for first, second, size in matcher.get_matching_blocks():
        yield from ((index, None) for index in range(i, first))
        yield from ((None, index) for index in range(j, second))
        yield from ((first + k, second + k) for k in range(size))
        i, j = first + size, second + size


def _kind(
    numbers: ValueNumbers,
    before: Program,
    after: Program,
    places: tuple[int, int],
    made: tuple[Numbered, Numbered],
) -> Hashable:
    """Return what changed calls of one kind share: all but the weights that both sides read.

    Of a weight both sides may read different parts, such as those of ranks.
    """
    calls = before.calls[places[0]], after.calls[places[1]]
    functions = before.function_of(calls[0]), after.function_of(calls[1])
    read = [
        {slot: _of_whole(numbers, program.weights[call.weights[slot]]) for slot in function.weights}
        for program, call, function in zip((before, after), calls, functions, strict=True)
    ]
    common = {n for n, _ in read[0].values()} & {n for n, _ in read[1].values()}
    alias: dict[int, int] = {}
    key: list[Hashable] = []
    for program, call, function, numbered, slots in zip(
        (before, after), calls, functions, made, read, strict=True
    ):
        args = [alias.setdefault(numbered.values[value], len(alias)) for value in function.params]
        key += [call.function, tuple(args), repr(sorted(call.attrs.items()))]
        for slot, (number, part) in sorted(slots.items()):
            weight = program.weights[call.weights[slot]]
            name = alias.setdefault(number, len(alias)) if number in common else -1 - number
            key.append((slot, name, part, weight.shape, weight.dtype))
        states = [program.states[call.caches[cache.slot]] for cache in function.caches]
        key.append(tuple((s.heads, s.k_dim, s.v_dim, s.dtype, s.policy) for s in states))
    return tuple(key)


def _of_whole(numbers: ValueNumbers, weight: Weight) -> tuple[int, Hashable]:
    """Return the number of what a weight is a part of, and which part; of others their own."""
    whole, part = whole_of(weight.producer)
    return numbers.weight(replace(weight, producer=whole)), part


def wrong_states(before: Program, after: Program) -> str | None:
    """Return what is wrong with the states of `after`, as a clause.

    A state belongs to one call, and holds as many bits as it did, or as the keys and values that
    it keeps.
    """
    from graphopt.ir.shapes import infer_program

    users: dict[str, str] = {}
    kinds, _ = infer_program(after)
    shared = _shared(before)
    for call, types in zip(after.calls, kinds, strict=True):
        for cache in after.function_of(call).caches:
            name = call.caches[cache.slot]
            where = call.path or call.function
            if name in users and name not in shared:
                return f"state {name!r} is kept by {users[name]} and by {where}"
            users[name] = where
            k, v = types[cache.present_k].dtype, types[cache.present_v].dtype
            state, old = after.states[name], before.states.get(name)
            if old is None and state.dtype not in (k, v):
                return f"state {name!r} of {where} is {state.dtype}, and its keys are {k}"
            if old is not None and state.dtype != old.dtype:
                return f"state {name!r} of {where} is {state.dtype}, and was {old.dtype}"
    return None


def _shared(program: Program) -> set[str]:
    names = [name for call in program.calls for name in call.caches.values()]
    return {name for name in names if names.count(name) > 1}
