"""The graph: values, nodes, functions, calls and the program that holds them.

A `Program` is a list of calls. Each `Call` applies a `Function` to values carried from call to
call, with its own weights, attribute values and state slots; layers of equal structure call one
function. Sizes are not stored in a function: `graphopt.ir.shapes` derives them for each call
from the weights and attributes of that call, so layers may differ in width, heads or window.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt.ir.kv import KVLayout, KVState
from graphopt.ir.placement import Placement
from graphopt.ir.types import Dim, Type
from graphopt.ir.vision import Vision
from graphopt.ir.weight_store import WeightStore
from graphopt.ir.weights import Weight, is_missing

PROGRAM_INPUTS = ("input_ids", "attention_mask", "position_ids")
"""What a language model may take: int64 [B, S], the mask [B, P + S]."""


@dataclass(frozen=True, slots=True)
class Param:
    """An attribute that every call of the function sets for itself."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class In:
    """In the arguments of an ATen node: the place of input number `index`."""

    index: int


@dataclass(eq=False, slots=True)
class Value:
    """One tensor inside a function.

    Attributes:
        name: Unique in its function; what the printer and the emitters show.
        node: The node that makes it; None for a parameter, weight or state.
        index: Which output of `node` it is.
    """

    name: str
    node: Node | None = None
    index: int = 0

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(eq=False, slots=True)
class Node:
    """One operation.

    Attributes:
        op: Name of a registered op, or `aten.<name>.<overload>` for what capture left as it was.
        inputs: Operands in the order of the op's `operands`; None for an absent optional one.
        attrs: Attributes; a value may be a `Param`.
        outputs: What it makes.
        annotations: What passes found out about it, by name, for the printer and the emitters:
            `str` of one is its lines. They decide no number and are not saved.
    """

    op: str
    inputs: list[Value | None]
    attrs: dict[str, Any]
    outputs: list[Value] = field(default_factory=list)
    annotations: dict[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> Value:
        """The only output."""
        (value,) = self.outputs
        return value

    def operand(self, index: int) -> Value | None:
        """Return an operand; None where it is absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def __repr__(self) -> str:
        results = ", ".join(map(repr, self.outputs))
        operands = ["-" if value is None else repr(value) for value in self.inputs]
        attrs = [f"{name}={value}" for name, value in self.attrs.items()]
        return f"<Node {results} = {self.op}({', '.join([*operands, *attrs])})>"


@dataclass(eq=False, slots=True)
class Cache:
    """The KV cache slot an attention of this function reads and extends.

    Attributes:
        slot: Name in the function; a call maps it to a state of the program.
        past_k, past_v: Inputs [B, kv_heads, P, head_dim], of a ring its length in place of P.
        present_k, present_v: Outputs [B, kv_heads, P + S, head_dim], at most a ring's slots.
        past_state, present_state: Inputs and outputs that a policy keeps beside keys and values, in
            the order of `KVState.policy_types`; none without a policy.
    """

    slot: str
    past_k: Value
    past_v: Value
    present_k: Value
    present_v: Value
    past_state: list[Value] = field(default_factory=list)
    present_state: list[Value] = field(default_factory=list)

    @property
    def pasts(self) -> list[Value]:
        """All that is read: keys, values, and a policy's state."""
        return [self.past_k, self.past_v, *self.past_state]

    @property
    def presents(self) -> list[Value]:
        """All that is left for the next step, in the order of `pasts`."""
        return [self.present_k, self.present_v, *self.present_state]


@dataclass(eq=False, slots=True)
class Function:
    """A straight-line graph with named parameters, weight slots and cache slots."""

    name: str
    params: list[Value] = field(default_factory=list)
    weights: dict[str, Value] = field(default_factory=dict)
    caches: list[Cache] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    results: list[Value] = field(default_factory=list)

    def __repr__(self) -> str:
        params = ", ".join(value.name for value in self.params)
        sizes = f"{len(self.nodes)} nodes, {len(self.weights)} weights"
        return f"<Function {self.name}({params}): {sizes}>"

    def slots_by_value(self) -> dict[Value, str]:
        """Return the slot of every weight, by the value that stands for it."""
        return {value: slot for slot, value in self.weights.items()}

    def add(
        self,
        op: str,
        inputs: Iterable[Value | None],
        attrs: dict[str, Any] | None = None,
        names: Iterable[str] = (),
        *,
        outputs: int = 1,
        before: Node | None = None,
    ) -> Node:
        """Append a node, or insert it before another, and return it; names are made unique."""
        wanted = list(names) or [op.split(".")[1] if op.startswith("aten.") else op] * outputs
        node = Node(op, list(inputs), dict(attrs or {}))
        taken = self.value_names()
        for index, name in enumerate(wanted):
            unique = unique_name(name, taken)
            taken.add(unique)
            node.outputs.append(Value(unique, node, index))
        if before is None:
            self.nodes.append(node)
        else:
            self.nodes.insert(self.nodes.index(before), node)
        return node

    def values(self) -> Iterator[Value]:
        """Every value of the function: parameters, weights, cache inputs, node outputs."""
        yield from self.params
        yield from self.weights.values()
        for cache in self.caches:
            yield from cache.pasts
        for node in self.nodes:
            yield from node.outputs

    def value_names(self) -> set[str]:
        return {value.name for value in self.values()}

    def uses(self) -> dict[Value, list[tuple[Node, int]]]:
        """For every value, the (node, operand index) places that read it."""
        uses: dict[Value, list[tuple[Node, int]]] = {value: [] for value in self.values()}
        for node in self.nodes:
            for index, value in enumerate(node.inputs):
                if value is not None:
                    uses[value].append((node, index))
        return uses

    def replace(self, old: Value, new: Value) -> None:
        """Make every reader of `old`, and the results, read `new` instead."""
        for node in self.nodes:
            node.inputs = [new if value is old else value for value in node.inputs]
        self.results = [new if value is old else value for value in self.results]
        for cache in self.caches:
            if cache.present_k is old:
                cache.present_k = new
            if cache.present_v is old:
                cache.present_v = new
            cache.present_state = [new if v is old else v for v in cache.present_state]

    def outside_values(self) -> set[Value]:
        """What is alive at the end: the results and the new cache contents."""
        alive = set(self.results)
        for cache in self.caches:
            alive.update(cache.presents)
        return alive

    def clone(self, name: str | None = None) -> Function:
        """Return an independent copy."""
        mapping: dict[Value, Value] = {}

        def value_of(value: Value) -> Value:
            if value not in mapping:
                mapping[value] = Value(value.name, None, value.index)
            return mapping[value]

        result = Function(name or self.name)
        result.params = [value_of(value) for value in self.params]
        result.weights = {slot: value_of(value) for slot, value in self.weights.items()}
        result.caches = [
            Cache(
                c.slot,
                value_of(c.past_k),
                value_of(c.past_v),
                value_of(c.present_k),
                value_of(c.present_v),
                list(map(value_of, c.past_state)),
                list(map(value_of, c.present_state)),
            )
            for c in self.caches
        ]
        for node in self.nodes:
            copied = Node(
                node.op,
                [None if v is None else value_of(v) for v in node.inputs],
                copy.deepcopy(node.attrs),
                [value_of(v) for v in node.outputs],
                dict(node.annotations),
            )
            for value in copied.outputs:
                value.node = copied
            result.nodes.append(copied)
        result.results = [value_of(value) for value in self.results]
        return result


@dataclass(eq=False, slots=True)
class Call:
    """One application of a function.

    Attributes:
        function: Name of the function.
        args: Program values for the function's parameters, by name.
        results: Names the results get in the program.
        weights: Function weight slot -> program weight name.
        attrs: Value of every `Param` the function mentions.
        caches: Function cache slot -> program state name.
        path: Module path of what this call was captured from, such as `model.layers.3`.
        placement: Which devices compute it, each the whole of it; None on one.
    """

    function: str
    args: list[str]
    results: list[str]
    weights: dict[str, str] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    caches: dict[str, str] = field(default_factory=dict)
    path: str = ""
    placement: Placement | None = None

    def __repr__(self) -> str:
        where = f" at {self.path}" if self.path else ""
        made = f"{', '.join(self.results)} = {self.function}({', '.join(self.args)})"
        return f"<Call {made}{where}>"


@dataclass(eq=False)
class Program:
    """A whole model.

    Attributes:
        name: What the source called it.
        inputs: Name and type of each input.
        outputs: Names of the program values it returns; the first is `logits` [B, S, vocab].
        functions: By name.
        calls: In order of execution.
        weights: By name.
        states: KV caches by name, in layer order; empty before `insert-kv-cache`.
        config: The Hugging Face config as a plain dict; {} for a bare nn.Module.
        generation: How text is to be generated, as generation_config.json says it; {} where
            nothing does. What of it counts says `graphopt.sources.generation`.
        source: What the user named, for reports.
        tokenizer: Folder with tokenizer files to copy into artifacts; None if there is none.
        checkpoint_dtype: dtype of most floating-point weights in the checkpoint.
        notes: What capture left as ATen, and why: (where, reason).
        max_length: How many tokens texts may have where that is not what the config states.
        licence: What the source states of its licence, such as "apache-2.0"; "" for nothing.
        licence_files: Paths of the source's licence and notices, to copy into artifacts.
        vision: What a model that takes pictures has beside its decoder, which the program is; None
            for a model of text alone.
    """

    name: str
    inputs: dict[str, Type] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    functions: dict[str, Function] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    weights: WeightStore = field(default_factory=WeightStore)
    states: dict[str, KVState] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    tokenizer: str | None = None
    checkpoint_dtype: torch.dtype = torch.float32
    notes: list[tuple[str, str]] = field(default_factory=list)
    max_length: int | None = None
    licence: str = ""
    licence_files: list[str] = field(default_factory=list)
    vision: Vision | None = None

    def function_of(self, call: Call) -> Function:
        return self.functions[call.function]

    def parameter_count(self) -> int:
        """Number of trained parameters; a tied weight counts once, a constant not at all."""
        return sum(w.numel for w in self.used_weights() if not w.constant)

    def used_weights(self) -> list[Any]:
        """The weights some call reads, in store order."""
        used = {name for call in self.calls for name in call.weights.values()}
        return [weight for weight in self.weights if weight.name in used]

    def stored_tensors(self) -> list[Weight]:
        """The dense tensors that hold all weights, of tower and projector too where there are."""
        carried = [] if self.vision is None else self.vision.carried.tensors()
        return [*self.weights.tensors(), *carried]

    def has_values(self) -> bool:
        """Return whether every weight has a value; those of a bare config have none."""
        return not any(is_missing(weight.producer) for weight in self.used_weights())

    def blocks(self) -> list[tuple[str, list[Call]]]:
        """Runs of calls as (part, calls): `embed` first, `block` for layers, `head` last."""
        groups: list[tuple[str, list[Call]]] = []
        for call in self.calls:
            if groups and groups[-1][0] == call.function:
                groups[-1][1].append(call)
            else:
                groups.append((call.function, [call]))
        return groups

    def copy(self) -> Program:
        """Return an independent copy that shares the producers of the weights."""
        return Program(
            name=self.name,
            inputs=dict(self.inputs),
            outputs=list(self.outputs),
            functions={name: function.clone() for name, function in self.functions.items()},
            calls=[
                Call(c.function, list(c.args), list(c.results), dict(c.weights),
                     copy.deepcopy(c.attrs), dict(c.caches), c.path, c.placement)
                for c in self.calls
            ],
            weights=self.weights.copy(),
            states={name: copy.copy(state) for name, state in self.states.items()},
            config=copy.deepcopy(self.config),
            generation=copy.deepcopy(self.generation),
            source=self.source,
            tokenizer=self.tokenizer,
            checkpoint_dtype=self.checkpoint_dtype,
            notes=list(self.notes),
            max_length=self.max_length,
            licence=self.licence,
            licence_files=list(self.licence_files),
            vision=None if self.vision is None else self.vision.copy(),
        )  # fmt: skip

    def prune_unused(self) -> None:
        """Drop functions, weights and states no call mentions."""
        called = {call.function for call in self.calls}
        self.functions = {n: f for n, f in self.functions.items() if n in called}
        for call in self.calls:
            slots = self.functions[call.function].weights
            call.weights = {s: w for s, w in call.weights.items() if s in slots}
        used = {name for call in self.calls for name in call.weights.values()}
        for weight in list(self.weights):
            if weight.name not in used:
                self.weights.remove(weight.name)
        states = {name for call in self.calls for name in call.caches.values()}
        self.states = {n: s for n, s in self.states.items() if n in states}

    def __str__(self) -> str:
        from graphopt.ir.printer import print_program

        return print_program(self)

    def __repr__(self) -> str:
        from graphopt.ir.printer import format_count

        parameters = format_count(self.parameter_count())
        sizes = f"{len(self.functions)} functions, {len(self.calls)} calls"
        return f"<Program {self.name!r}: {parameters} parameters, {sizes}>"


def unique_name(name: str, taken: set[str]) -> str:
    """Return `name`, or `name_1`, `name_2`, ... whichever is not in `taken`."""
    if name not in taken:
        return name
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def resolve_attrs(node: Node, call: Call) -> dict[str, Any]:
    """Return the attributes of `node` with each `Param` replaced by the call's value."""
    return {
        key: call.attrs[value.name] if isinstance(value, Param) else value
        for key, value in node.attrs.items()
    }


__all__ = [
    "Cache",
    "Call",
    "Dim",
    "Function",
    "In",
    "KVLayout",
    "KVState",
    "Node",
    "Param",
    "Placement",
    "Program",
    "Type",
    "Value",
    "resolve_attrs",
    "unique_name",
]
