"""Splitting a program over ranks: function by function, weight by weight."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace

from graphopt.ir.graph import Call, Function, Program, Value, unique_name
from graphopt.ir.parts import check_split
from graphopt.ir.placement import Placement
from graphopt.ir.printer import print_function
from graphopt.ir.shapes import infer_function, infer_program
from graphopt.ir.split import Layout, Split
from graphopt.ir.types import Type
from graphopt.ir.weight_store import WeightStore
from graphopt.passes.shard.norms import with_halved_norms
from graphopt.passes.shard.plan import Planned, plan_function
from graphopt.passes.shard.rewrite import Rewritten, Ungathered, rewrite
from graphopt.passes.shard.vocabulary import Vocabulary, divide_vocabulary

_NOTHING = "no matrix in front of it or behind it splits with it"


@dataclass
class Sharded:
    """A program that was split.

    Attributes:
        program: What every rank runs.
        vocabulary: What became of tables with a row for every token.
        plans: What was planned for each call, in their order.
    """

    program: Program
    vocabulary: Vocabulary
    plans: list[Planned]

    def whole(self) -> Iterator[tuple[Call, str, str]]:
        """Yield the matrices that no device has a part of, as call, slot and the reason."""
        tables = dict(self.vocabulary.whole)
        for call, plan in zip(self.program.calls, self.plans, strict=True):
            for slot, name in call.weights.items():
                weight = self.program.weights[name]
                placement = weight.placement
                if len(weight.shape) < 2 or placement is None or placement.axis is not None:
                    continue
                why = tables.get(name) or plan.whole.get(slot) or _NOTHING
                if not placement.summed:
                    yield call, slot, why


def shard(program: Program, devices: tuple[str, ...]) -> Sharded:
    """Split a program over devices, in place."""
    vocabulary = divide_vocabulary(program, len(devices))
    try:
        return _Sharding(program, devices, vocabulary, shares_keys=True).run()
    except Ungathered:
        return _Sharding(program, devices, vocabulary, shares_keys=False).run()


class _Sharding:
    """One attempt to split a program.

    Args:
        shares_keys: Whether a call hands a rank's keys to others, which attend to them.
    """

    def __init__(
        self, program: Program, devices: tuple[str, ...], vocabulary: Vocabulary, shares_keys: bool
    ) -> None:
        self.program, self.devices, self.vocabulary = program, devices, vocabulary
        self.shares_keys = shares_keys
        self.types, _ = infer_program(program)
        self.made: dict[Hashable, tuple[Planned, Rewritten, str]] = {}
        self.functions: dict[str, Function] = {}
        self.texts: dict[tuple[str, str], str] = {}

    def run(self) -> Sharded:
        program, carried = self.program, dict[str, Split | None]()
        done: list[tuple[Call, Planned, Rewritten, str]] = []
        for call, types in zip(program.calls, self.types, strict=True):
            function = program.function_of(call)
            split = {v: carried.get(n) for v, n in zip(function.params, call.args, strict=True)}
            given = {value: how for value, how in split.items() if how is not None}
            encodings = tuple(
                (slot, program.weights[name].encoding)
                for slot, name in sorted(call.weights.items())
            )
            attrs = repr(sorted(call.attrs.items()))
            key = (call.function, id(types), attrs, encodings, tuple(given.items()))
            if key not in self.made:
                self.made[key] = self._function(function, call, types, given)
            planned, rewritten, name = self.made[key]
            carried.update(zip(call.results, rewritten.results, strict=True))
            done.append((call, planned, rewritten, name))
        # Nothing was changed before all could be.
        for call, _, rewritten, name in done:
            call.function = name
            call.weights = {slot: call.weights[slot] for slot in rewritten.function.weights}
            self._place(call, rewritten)
        program.functions = self.functions
        self._place_others()
        return Sharded(program, self.vocabulary, [planned for _, planned, _, _ in done])

    def _function(
        self, function: Function, call: Call, types: Mapping[Value, Type],
        given: Mapping[Value, Split],
    ) -> tuple[Planned, Rewritten, str]:  # fmt: skip
        def may_split(slot: str, split: Split) -> None:
            weight = self.program.weights[call.weights[slot]]
            check_split(weight, split.placement(self.devices))

        slots = self.vocabulary.slots.get(function.name, [])
        planned = plan_function(
            function, call, types, len(self.devices), given, may_split, slots,
            shares_keys=self.shares_keys,
        )  # fmt: skip
        halved = with_halved_norms(function, types) if planned.attentions.get("whole") else None
        if halved is not None:
            own, values = halved
            args = [types[value] for value in function.params]
            again = plan_function(
                own, call, infer_function(own, call, args, self.program), len(self.devices),
                {values[value]: split for value, split in given.items()}, may_split, slots,
                shares_keys=self.shares_keys,
            )  # fmt: skip
            if again.attentions.get("whole", 0) < planned.attentions["whole"]:
                planned = again
        rewritten = rewrite(planned.regions, planned.columns)
        # Calls that differ in what does not matter here go on sharing a function.
        text = print_function(rewritten.function)
        name = self.texts.get((function.name, text))
        if name is None:
            name = unique_name(function.name, set(self.functions))
            self.texts[function.name, text] = name
            rewritten.function.name = name
            self.functions[name] = rewritten.function
        return planned, replace(rewritten, function=self.functions[name]), name

    def _place(self, call: Call, rewritten: Rewritten) -> None:
        """Place the weights and states of a call."""
        for slot, name in call.weights.items():
            layout = rewritten.weights.get(slot)
            wanted = _placement(layout, self.devices)
            weight = self.program.weights[name]
            if weight.placement is None:
                self.program.weights.replace(replace(weight, placement=wanted))
            elif weight.placement != wanted:
                # Layers may share a weight, such as the slopes of heads, and split differently.
                call.weights[slot] = self._another(name, wanted)
        for slot, split in rewritten.states.items():
            self.program.states[call.caches[slot]].placement = split.placement(self.devices)

    def _another(self, name: str, wanted: Placement) -> str:
        """Return the name of a weight with the value of another one and a placement."""
        weights = self.program.weights
        own = replace(weights[name], placement=wanted)
        for other in weights:
            if other.producer is own.producer and other.placement == wanted:
                return other.name
        taken = {weight.name for weight in weights}
        return weights.add(replace(own, name=unique_name(f"{name}.placed", taken))).name

    def _place_others(self) -> None:
        """Put copies of all that is not split on every device."""
        whole = Placement(self.devices)
        for state in self.program.states.values():
            state.placement = state.placement or whole
        self.program.weights = WeightStore(
            {w.name: replace(w, placement=w.placement or whole) for w in self.program.weights}
        )


def _placement(layout: Layout, devices: tuple[str, ...]) -> Placement:
    if layout == "sum":
        return Placement(devices, summed=True)
    return Placement(devices) if layout is None else layout.placement(devices)
