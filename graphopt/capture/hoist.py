"""Moving what every layer computes alike out of the layers, into the outer graph around them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch

from graphopt.capture.attention import Raised
from graphopt.capture.layer_calls import LayerCall
from graphopt.capture.rewriting import Raiser
from graphopt.capture.slots import SlotSources
from graphopt.ir.graph import Node, Value


@dataclass
class LayerKind:
    """Layers that share one function.

    Attributes:
        raiser: The function, its parameters in the order of the layer calls' operands.
        slots: Its derived weight slots.
        layer_calls: The outer graph's nodes that stand for its calls, in order.
        records: What was recorded about each call.
        raised: Its attention nodes.
        attrs: For each layer call, the attributes that differ between calls.
    """

    raiser: Raiser
    slots: SlotSources
    layer_calls: list[Node]
    records: list[LayerCall]
    raised: list[Raised] = field(default_factory=list)
    attrs: list[dict[str, object]] = field(default_factory=list)

    def add_param(self, name: str, values: list[Value], outer: Raiser) -> Value:
        """Add a parameter that each layer call gets from its own value of the outer graph."""
        taken = self.raiser.function.value_names()
        while name in taken:
            name += "_"
        param = Value(name)
        self.raiser.function.params.append(param)
        self.raiser.types[param] = outer.types[values[0]]
        for layer_call, value in zip(self.layer_calls, values, strict=True):
            layer_call.inputs.append(value)
        return param

    def arguments(self, param: Value) -> list[Value]:
        """Return what each layer call passes for a parameter."""
        position = self.raiser.function.params.index(param)
        return [layer_call.inputs[position] for layer_call in self.layer_calls]  # type: ignore[misc]

    def drop_unused_params(self) -> None:
        """Remove parameters nothing reads, from the function and its layer calls."""
        function = self.raiser.function
        used = function.outside_values()
        used |= {v for node in function.nodes for v in node.inputs if v is not None}
        used |= {term.value for item in self.raised for term in item.terms}
        for position in reversed(range(len(function.params))):
            if function.params[position] not in used:
                del function.params[position]
                for layer_call in self.layer_calls:
                    del layer_call.inputs[position]


def stream_values(outer: Raiser, layer_calls: set[Node]) -> set[Value]:
    """Return the outer graph's values that depend on a trained weight or on a layer's output."""
    stream: set[Value] = {v for v in outer.function.weights.values() if outer.is_weight(v)}
    for node in outer.function.nodes:
        if node in layer_calls or any(v in stream for v in node.inputs if v is not None):
            stream.update(node.outputs)
    return stream


def merge_equal_constants(kind: LayerKind) -> None:
    """Nothing differs between layers in a constant that all of them hold alike.

    Constants are recorded for the exported layer; here the other layers' are compared, and a
    slot whose values differ is no longer taken for a constant.
    """
    for slot in list(kind.raiser.constants):
        value = kind.raiser.constants[slot]
        for record in kind.records:
            other = held_constant(record.module, slot)
            if other is None:
                continue
            if other.shape != value.shape or not torch.equal(other.to(value.dtype), value):
                del kind.raiser.constants[slot]
                break


def held_constant(module: torch.nn.Module, slot: str) -> torch.Tensor | None:
    """Return what a module holds by a slot's name; None where its forward makes the constant."""
    target: object = module
    for part in slot.split("."):
        target = getattr(target, part, None)
    return target if isinstance(target, torch.Tensor) and not target.is_meta else None


def made_alike(
    module: torch.nn.Module, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> bool:
    """Whether constants of equal slots that no module holds, but its forward makes, are equal."""
    return all(
        held_constant(module, slot) is not None
        or (value.dtype == theirs[slot].dtype and torch.equal(value, theirs[slot]))
        for slot, value in ours.items()
    )


def hoist(outer: Raiser, kind: LayerKind, stream: set[Value]) -> None:
    """Move nodes of a layer that depend on nothing but the model's inputs to the outer graph."""
    raiser = kind.raiser
    function = raiser.function
    still = {p for p in function.params if not any(a in stream for a in kind.arguments(p))}
    fixed: set[Value] = set(still)
    moved: list[Node] = []
    for node in function.nodes:
        operands = [v for v in node.inputs if v is not None]
        if all(v in fixed or raiser.constant(v) is not None for v in operands):
            fixed.update(node.outputs)
            moved.append(node)
    readers = {v for node in function.nodes if node not in moved for v in node.inputs}
    readers |= set(function.results)
    exits = [v for node in moved for v in node.outputs if v in readers]
    if not exits:
        return
    made: dict[tuple[Value | None, ...], list[Value]] = {}
    per_layer_call: list[list[Value]] = []
    order = [function.params.index(p) for p in function.params if p in still]
    for layer_call in kind.layer_calls:
        key = tuple(layer_call.inputs[position] for position in order)
        if key not in made:
            made[key] = _clone_into(outer, kind, moved, exits, layer_call)
        per_layer_call.append(made[key])
    for index, value in enumerate(exits):
        param = kind.add_param(value.name, [values[index] for values in per_layer_call], outer)
        raiser.types[param] = raiser.types[value]
        function.replace(value, param)
    raiser.sweep()


def _clone_into(
    outer: Raiser, kind: LayerKind, moved: list[Node], exits: list[Value], layer_call: Node
) -> list[Value]:
    """Copy nodes of a layer in front of a call of it, and return the copies of the exits."""
    raiser = kind.raiser
    mapping: dict[Value, Value] = dict(
        zip(raiser.function.params, layer_call.inputs, strict=True)  # type: ignore[arg-type]
    )
    needed = set(raiser.region(exits, raiser.function.params))
    for node in moved:
        if node not in needed:
            continue
        for value in node.inputs:
            if value is not None and value not in mapping:
                mapping[value] = _constant_in_outer(outer, kind, value, layer_call)
        hoisted = outer.function.add(
            node.op,
            [None if v is None else mapping[v] for v in node.inputs],
            copy.deepcopy(node.attrs),
            [value.name for value in node.outputs],
            before=layer_call,
        )
        for old, new in zip(node.outputs, hoisted.outputs, strict=True):
            mapping[old] = new
            outer.types[new] = raiser.types[old]
    return [mapping[value] for value in exits]


def _constant_in_outer(outer: Raiser, kind: LayerKind, value: Value, layer_call: Node) -> Value:
    """Return the outer graph's copy of a constant that all layers of a kind hold."""
    slot = kind.raiser.slot(value)
    assert slot is not None
    constant = kind.raiser.constants[slot]
    record = kind.records[kind.layer_calls.index(layer_call)]
    name = f"{record.path}.{slot}"
    if name in outer.function.weights:
        return outer.function.weights[name]
    outer.constants[name] = constant
    return outer.add_weight(name, tuple(constant.shape), constant.dtype)
