"""A sharded program as one that runs everywhere: the programs of all ranks, in lockstep.

Every node stands once for each rank, on the rank's own parts, and a collective is what it makes of
the ranks' values: a sum, or one part behind the other. What is the same on all ranks, because each
computes it of the same operands, stands there once. Inputs, outputs and states are those of the
program before it was split, so that it is compared with that one like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from graphopt.ir.graph import (
    Cache,
    Call,
    Function,
    In,
    Node,
    Program,
    Value,
    resolve_attrs,
    unique_name,
)
from graphopt.ir.kv import KVState
from graphopt.ir.ops.collectives import COLLECTIVES
from graphopt.ir.ops.fused_collectives import FUSED_COLLECTIVES, types_between, unfused
from graphopt.ir.placement import Placement
from graphopt.ir.ranks import group_of, rank_program, rank_weight
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Dim, Type, dim
from graphopt.ir.weights import Weight

Parts = list[Value]
"""What a value is on each rank; one and the same where they are equal."""


def as_one_program(program: Program) -> Program:
    """Return a sharded program as one without placements; any other as it is.

    Raises:
        ValueError: An op of it draws random numbers, which ranks would not share.
    """
    devices = group_of(program)
    return program if not devices else _Simulation(program, len(devices)).run()


class _Simulation:
    def __init__(self, program: Program, ranks: int) -> None:
        self.old, self.ranks = program, ranks
        self.types, _ = infer_program(program)
        self.new = program.copy()
        self.made: dict[object, _Body] = {}

    def run(self) -> Program:
        new = self.new
        new.functions = {}
        for state in new.states.values():
            state.placement = None
        varying: set[str] = set()
        for number, call in enumerate(new.calls):
            call.placement = None
            given = tuple(name in varying for name in call.args)
            placements = tuple(
                (slot, self.old.weights[name].placement)
                for slot, name in sorted(call.weights.items())
            )
            states = tuple((s, self.old.states[n].placement) for s, n in call.caches.items())
            key = (call.function, id(self.types[number]), given, placements, states)
            if key not in self.made:
                self.made[key] = self._body(number, call, given)
            body = self.made[key]
            call.function = body.function.name
            call.args = [
                n for n, many in zip(call.args, given, strict=True) for n in self._names(n, many)
            ]
            names = list(zip(call.results, body.varying, strict=True))
            call.results = [n for name, many in names for n in self._names(name, many)]
            varying -= {name for name, _ in names}
            varying |= {name for name, many in names if many}
            call.weights = {
                own: self._weight(call.weights[slot], rank)
                for slot, own, rank in body.slots
                if own in body.function.weights
            }
        read = {name for call in new.calls for name in call.weights.values()}
        for weight in list(new.weights):
            if weight.name not in read:
                new.weights.remove(weight.name)
        for weight in list(new.weights):
            new.weights.replace(replace(weight, placement=None))
        return new

    def _names(self, name: str, many: bool) -> list[str]:
        return [f"{name} on {rank}" for rank in range(self.ranks)] if many else [name]

    def _weight(self, name: str, rank: int | None) -> str:
        """Return the name of a rank's part of a weight, which is added; of a whole one its own."""
        if rank is None:
            return name
        full = f"{name} on {rank}"
        if full not in self.new.weights:
            self.new.weights.add(replace(rank_weight(self.old.weights[name], rank), name=full))
        return full

    def _body(self, number: int, call: Call, given: Sequence[bool]) -> _Body:
        function = self.old.functions[call.function]
        weights = {slot: self.old.weights[name] for slot, name in call.weights.items()}
        states = {slot: self.old.states[name] for slot, name in call.caches.items()}
        name = unique_name(function.name, set(self.new.functions))
        body = _Body(function, call, name, self.ranks, self.types[number])
        body.build(given, weights, states)
        self.new.functions[name] = body.function
        return body


class _Body:
    """One function for all ranks.

    Attributes:
        function: The function.
        slots: (slot before, slot, rank) of its weights; no rank where all have the same.
        varying: Which of its results before there is one of for each rank.
    """

    def __init__(
        self, old: Function, call: Call, name: str, ranks: int, types: dict[Value, Type]
    ) -> None:
        self.old, self.call, self.ranks, self.types = old, call, ranks, dict(types)
        self.function = Function(name)
        self.slots: list[tuple[str, str, int | None]] = []
        self.varying: list[bool] = []
        self.parts: dict[Value, Parts] = {}
        self.taken: set[str] = set()

    def build(
        self, given: Sequence[bool], weights: dict[str, Weight], states: dict[str, KVState]
    ) -> None:
        function = self.function
        for value, many in zip(self.old.params, given, strict=True):
            function.params += self._values(value, range(self.ranks if many else 1))
        for slot, value in self.old.weights.items():
            self._slot(slot, value, weights[slot].placement)
        for cache in self.old.caches:
            self._past(cache, states[cache.slot])
        for node in self.old.nodes:
            self._node(node)
        for cache in self.old.caches:
            self._present(cache, states[cache.slot])
        for value in self.old.results:
            parts = self.parts[value]
            many = any(part is not parts[0] for part in parts)
            self.varying.append(many)
            function.results += parts if many else parts[:1]

    def _fresh(self, name: str) -> str:
        name = unique_name(name, self.taken)
        self.taken.add(name)
        return name

    def _values(self, value: Value, numbers: Sequence[int]) -> list[Value]:
        """Make values that stand for one on the ranks; a single one on all of them."""
        made = [Value(self._fresh(value.name)) for _ in numbers]
        self.parts[value] = made if len(made) > 1 else made * self.ranks
        return made

    def _slot(self, slot: str, value: Value, placement: Placement | None) -> None:
        if placement is None or (placement.axis is None and not placement.summed):
            (self.function.weights[slot],) = self._values(value, range(1))
            self.slots.append((slot, slot, None))
            return
        owners = range(0, self.ranks, placement.copies)
        made = [Value(self._fresh(value.name)) for _ in owners]
        self.parts[value] = [made[rank // placement.copies] for rank in range(self.ranks)]
        for rank, own in zip(owners, made, strict=True):
            name = f"{slot} on {rank}"
            self.function.weights[name] = own
            self.slots.append((slot, name, rank))

    def _add(self, op: str, inputs: Sequence[Value], attrs: dict[str, Any], name: str) -> Value:
        node = Node(op, list(inputs), attrs)
        node.outputs = [Value(self._fresh(name), node)]
        self.function.nodes.append(node)
        return node.output

    # Caches: one whole state, of which every rank reads and writes its heads

    def _past(self, cache: Cache, state: KVState) -> None:
        own = [Value(self._fresh(value.name)) for value in cache.pasts]
        for value, whole in zip(cache.pasts, own, strict=True):
            self.parts[value] = self._heads(whole, value, state.placement)
        new = Cache(cache.slot, own[0], own[1], own[0], own[1], own[2:])
        self.function.caches.append(new)

    def _heads(self, whole: Value, value: Value, placement: Placement | None) -> Parts:
        kind = self.types[value]
        if placement is None or placement.axis is None or len(kind.shape) < 3:
            return [whole] * self.ranks
        size = int(kind.shape[1])
        cut = [
            self._add(
                "aten.slice.Tensor",
                [whole],
                {"args": [In(0), 1, n * size, (n + 1) * size], "kwargs": {}, "types": [kind]},
                value.name,
            )
            for n in range(placement.parts)
        ]
        return [cut[placement.part_of(rank)] for rank in range(self.ranks)]

    def _present(self, cache: Cache, state: KVState) -> None:
        new = next(c for c in self.function.caches if c.slot == cache.slot)
        placement = state.placement
        whole: list[Value] = []
        for value in cache.presents:
            parts, kind = self.parts[value], self.types[value]
            if placement is None or placement.axis is None or len(kind.shape) < 3:
                whole.append(parts[0])
            else:
                own = parts[:: placement.copies]
                whole.append(self._joined(own, kind, 1, value.name))
        new.present_k, new.present_v, *new.present_state = whole

    def _joined(self, parts: Sequence[Value], kind: Type, axis: int, name: str) -> Value:
        sizes: list[Dim] = list(kind.shape)
        sizes[axis] = dim(sizes[axis] * len(parts))
        operands = [In(place) for place in range(len(parts))]
        attrs: dict[str, Any] = {
            "args": [operands, axis], "kwargs": {}, "types": [Type(tuple(sizes), kind.dtype)]
        }  # fmt: skip
        return self._add("aten.cat.default", parts, attrs, name)

    # Nodes

    def _node(self, node: Node) -> None:
        if node.op in COLLECTIVES:
            self._collective(node)
            return
        stages = unfused(node)
        if stages != [node]:
            self.types |= types_between(stages, self.types)
            for stage in stages:
                self._node(stage)
            return
        operands = [
            tuple(None if v is None else self.parts[v][rank] for v in node.inputs)
            for rank in range(self.ranks)
        ]
        made: dict[tuple[Value | None, ...], Node] = {}
        for own in operands:
            if own not in made:
                copied = Node(node.op, list(own), dict(node.attrs))
                copied.outputs = [
                    Value(self._fresh(value.name), copied, place)
                    for place, value in enumerate(node.outputs)
                ]
                self.function.nodes.append(copied)
                made[own] = copied
        for place, value in enumerate(node.outputs):
            self.parts[value] = [made[own].outputs[place] for own in operands]

    def _collective(self, node: Node) -> None:
        attrs = resolve_attrs(node, self.call)
        x = node.inputs[0]
        assert x is not None
        parts, kind, name = self.parts[x], self.types[x], node.output.name
        if node.op == "all_gather":
            self.parts[node.output] = [self._joined(parts, kind, attrs["axis"], name)] * self.ranks
            return
        total = parts[0]
        for part in parts[1:]:
            total = self._add("add", [total, part], {}, name)
        if node.op == "all_reduce":
            self.parts[node.output] = [total] * self.ranks
            return
        axis, own = attrs["axis"], self.types[node.output]
        size = int(own.shape[axis])
        self.parts[node.output] = [
            self._add(
                "aten.slice.Tensor",
                [total],
                {
                    "args": [In(0), axis, rank * size, (rank + 1) * size],
                    "kwargs": {},
                    "types": [own],
                },
                name,
            )
            for rank in range(self.ranks)
        ]


def rank_alone(program: Program) -> Program:
    """Return what the first rank of a sharded program runs, with collectives that send nothing.

    What they give has the right sizes, and other values: for looking at memory and time, not at
    results. A program that is not sharded is returned as it is.
    """
    if not group_of(program):
        return program
    types, _ = infer_program(program)
    own = rank_program(program, 0)
    for call, kinds in zip(program.calls, types, strict=True):
        old, new = program.functions[call.function], own.functions[call.function]
        if len(new.nodes) > len(old.nodes):
            continue  # another call of it came before
        for node, copied in zip(old.nodes, [*new.nodes], strict=True):
            if copied.op in COLLECTIVES:
                copied.op, copied.attrs = _sending_nothing(copied, kinds[node.output])
            elif copied.op in FUSED_COLLECTIVES:
                *before, product, _ = unfused(copied)
                place = new.nodes.index(copied)
                new.nodes[place:place] = before
                copied.op, copied.inputs, copied.attrs = "linear", product.inputs, {}
    return own


def _sending_nothing(node: Node, kind: Type) -> tuple[str, dict[str, Any]]:
    """Return an op, and its attributes, that makes as much memory of an operand as a collective."""
    ranks, axis = node.attrs["ranks"], node.attrs.get("axis")
    if node.op == "all_reduce":
        return "scale", {"factor": 1.0}
    own = {"kwargs": {}, "types": [kind]}
    if node.op == "all_gather":
        return "aten.cat.default", {"args": [[In(0)] * ranks, axis], **own}
    assert isinstance(axis, int)
    return "aten.slice.Tensor", {"args": [In(0), axis, 0, kind.shape[axis]], **own}
