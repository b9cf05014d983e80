"""From exported functions to a program."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.capture.export import export_layer, export_outer
from graphopt.capture.fx_conversion import Exported
from graphopt.capture.grouped import grouped_products
from graphopt.capture.hoist import LayerKind, made_alike
from graphopt.capture.layer_calls import LAYER, LayerCall
from graphopt.capture.model import accepted_inputs
from graphopt.capture.naming import name_slots, name_values
from graphopt.capture.rewriting import Raiser, base
from graphopt.capture.rotary import Rotaries
from graphopt.capture.sizes_check import check_sizes
from graphopt.capture.slots import SlotSources
from graphopt.capture.steps import Capturing, Watch
from graphopt.capture.unsupported import refuse_unsupported
from graphopt.ir.graph import (
    PROGRAM_INPUTS,
    Call,
    Function,
    Node,
    Program,
    Value,
    unique_name,
)
from graphopt.ir.ops import is_aten
from graphopt.ir.printer import print_function
from graphopt.ir.types import B, S, Type
from graphopt.ir.verify import verify
from graphopt.ir.weights import Array, Producer, Weight

Resolve = Callable[[str, "Tensor"], tuple[Producer, str | None]]
"""(qualified parameter name, parameter) -> (its producer, its checkpoint tensor's name)."""


def capture_module(
    module: nn.Module,
    name: str,
    resolve: Resolve,
    trained: Collection[str] = (),
    watch: Watch | None = None,
) -> Program:
    """Capture a language model.

    Args:
        module: Parameters may stand on meta; buffers must be real.
        name: What to call the program.
        resolve: Gives the producer of every parameter, and of every trained buffer.
        trained: Buffers that are weights rather than constants, in every layer alike.
        watch: Told about every step.

    Raises:
        CaptureError: torch.export cannot trace the module, or what it traced holds for one length
            alone.
    """
    accepted_inputs(module)
    refuse_unsupported(module)
    rotaries = Rotaries(module)
    with rotaries.opaque(), grouped_products(module):
        exported = export_outer(module)
        weights = _Trained(trained)
        weights.release(exported, "")
        slots = SlotSources()
        outer = Raiser(exported.function, exported.types, exported.constants, "the model")
        kinds = _layer_kinds(exported, outer, weights)
    if not kinds:
        outer, kinds = _single(exported, module, slots)
    state = Capturing(outer, kinds, slots, rotaries)
    state.run(watch)
    program = _Assembler(outer, slots, state.kinds, module, resolve).program(name)
    program.notes += state.notes + _left_over(program)
    program.inputs = {input_name: Type((B, S), torch.int64) for input_name in PROGRAM_INPUTS}
    verify(program)
    check_sizes(program)
    return program


class _Trained:
    """The buffers that are weights: by their names with all layer numbers alike."""

    def __init__(self, names: Collection[str]) -> None:
        self._patterns = {_without_numbers(name) for name in names}

    def release(self, exported: Exported, path: str) -> None:
        """No longer take a module's trained buffers for constants."""
        for slot in list(exported.constants):
            if _without_numbers(f"{path}.{slot}".lstrip(".")) in self._patterns:
                del exported.constants[slot]


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _layer_kinds(exported: Exported, outer: Raiser, trained: _Trained) -> list[LayerKind]:
    """Export the first and the last layer of every group; all of it where those two differ."""

    def export(record: LayerCall, shapes: Sequence[Type]) -> Exported:
        exported = export_layer(record, shapes)
        trained.release(exported, record.path)
        return exported

    groups: dict[Any, list[tuple[Node, LayerCall]]] = {}
    for node, record in exported.layer_calls.items():
        groups.setdefault(record.key, []).append((node, record))
    kinds: list[LayerKind] = []
    for members in groups.values():
        shapes = [outer.types[v] for v in members[0][0].inputs if v is not None]
        first = export(members[0][1], shapes)
        if len(members) == 1:
            kinds.append(_kind(first, members))
            continue
        last = export(members[-1][1], shapes)
        if _equal(first, last, members[0][1].module):
            kinds.append(_kind(first, members))
            continue
        kinds.append(_kind(first, members[:1]))
        for member in members[1:-1]:
            kinds.append(_kind(export(member[1], shapes), [member]))
        kinds.append(_kind(last, members[-1:]))
    return kinds


def _equal(a: Exported, b: Exported, module: nn.Module) -> bool:
    texts = print_function(a.function), print_function(b.function)
    return texts[0] == texts[1] and made_alike(module, a.constants, b.constants)


def _kind(exported: Exported, members: list[tuple[Node, LayerCall]]) -> LayerKind:
    record = members[0][1]
    raiser = Raiser(exported.function, exported.types, exported.constants, record.path)
    return LayerKind(raiser, SlotSources(), [n for n, _ in members], [r for _, r in members])


def _single(
    exported: Exported, module: nn.Module, slots: SlotSources
) -> tuple[Raiser, list[LayerKind]]:
    """A model without repeated layers: one call of it inside an empty outer graph."""
    inner = Raiser(exported.function, exported.types, exported.constants, "the model")
    function = Function("outer")
    types: dict[Value, Type] = {}
    for param in exported.function.params:
        value = Value(param.name)
        function.params.append(value)
        types[value] = exported.types[param]
    layer_call = function.add(LAYER, function.params, {"args": [[], 0]})
    function.results = [layer_call.output]
    types[layer_call.output] = exported.types[exported.function.results[0]]
    record = LayerCall("", module, None, [], [])
    return Raiser(function, types, {}, "the model"), [
        LayerKind(inner, slots, [layer_call], [record])
    ]


def _left_over(program: Program) -> list[tuple[str, str]]:
    """Name the kinds of ATen nodes that stayed, function by function."""
    notes: list[tuple[str, str]] = []
    for function in program.functions.values():
        counts: dict[str, int] = {}
        for node in function.nodes:
            if is_aten(node.op):
                counts[node.op] = counts.get(node.op, 0) + 1
        if counts:
            text = ", ".join(f"{n} x{c}" if c > 1 else n for n, c in sorted(counts.items()))
            notes.append((function.name, f"left as ATen: {text}"))
    return notes


class _Assembler:
    """Cuts the outer graph at its layer calls and lays the calls out."""

    def __init__(
        self,
        outer: Raiser,
        slots: SlotSources,
        kinds: list[LayerKind],
        module: nn.Module,
        resolve: Resolve,
    ) -> None:
        self.outer = outer
        self.slots = slots
        self.kinds = kinds
        self.module = module
        self.resolve = resolve
        self.kind_of = {layer_call: kind for kind in kinds for layer_call in kind.layer_calls}
        self.layer_calls = [n for n in outer.function.nodes if n in self.kind_of]
        self.result = Program("model")
        self.names: dict[Value, str] = {}
        self.constants: list[tuple[Tensor, str]] = []

    def program(self, name: str) -> Program:
        program = self.result
        program.name = name
        self._drop_unused_results()
        self.outer.sweep()
        stages = self._stages()
        for param in self.outer.function.params:
            self.names[param] = param.name
        self._name_functions()
        for position in range(len(self.layer_calls) + 1):
            nodes = [n for n, stage in stages.items() if stage == position]
            self._segment(position, nodes)
            if position < len(self.layer_calls):
                self._layer(position, self.layer_calls[position])
        program.outputs = [self.names[self.outer.function.results[0]]]
        for call in program.calls:
            call.results = ["logits" if r == program.outputs[0] else r for r in call.results]
        program.outputs = ["logits"]
        return program

    def _drop_unused_results(self) -> None:
        function = self.outer.function
        used = {v for node in function.nodes for v in node.inputs} | set(function.results)
        for kind in self.kinds:
            count = len(kind.raiser.function.results)
            keep = [
                i
                for i in range(count)
                if any(layer_call.outputs[i] in used for layer_call in kind.layer_calls)
            ]
            kind.raiser.function.results = [kind.raiser.function.results[i] for i in keep]
            for layer_call in kind.layer_calls:
                layer_call.outputs = [layer_call.outputs[i] for i in keep]
            kind.raiser.sweep()
            kind.drop_unused_params()

    def _stages(self) -> dict[Node, int]:
        """For every node of the outer graph, the number of layer calls it must come after."""
        stage_of: dict[Value, int] = {}
        stages: dict[Node, int] = {}
        number = 0
        for node in self.outer.function.nodes:
            if node in self.kind_of:
                number += 1
                for value in node.outputs:
                    stage_of[value] = number
                continue
            stage = max((stage_of.get(v, 0) for v in node.inputs if v is not None), default=0)
            stages[node] = stage
            for value in node.outputs:
                stage_of[value] = stage
        return stages

    def _name_functions(self) -> None:
        single = len(self.layer_calls) == 1 and self.kinds[0].records[0].path == ""
        for number, kind in enumerate(self.kinds):
            function = kind.raiser.function
            function.name = "main" if single else "block" if number == 0 else f"block_{number}"
            self._remove_unused_slots(function)
            name_slots(function, kind.slots)
            _name_params(kind, self.outer)
            name_values(function)
            self.result.functions[function.name] = function

    @staticmethod
    def _remove_unused_slots(function: Function) -> None:
        used = {v for node in function.nodes for v in node.inputs} | set(function.results)
        function.weights = {s: v for s, v in function.weights.items() if v in used}

    def _segment(self, position: int, nodes: list[Node]) -> None:
        """Make the function and call for the outer graph's nodes between two layer calls."""
        if not nodes:
            return
        inside = {v for node in nodes for v in node.outputs}
        readers = [n for n in self.outer.function.nodes if n not in nodes]
        wanted = {v for n in readers for v in n.inputs if v in inside}
        wanted |= {v for v in self.outer.function.results if v in inside}
        results = [v for node in nodes for v in node.outputs if v in wanted]
        if not results:
            return
        last = len(self.layer_calls)
        label = "embed" if position == 0 else "head" if position == last else "inter_layer"
        function = Function(unique_name(label, set(self.result.functions)))
        mapping: dict[Value, Value] = {}
        call = Call(function.name, [], [])
        for node in nodes:
            for value in node.inputs:
                if value is None or value in mapping or value in inside:
                    continue
                slot = self.outer.slot(value)
                if slot is None:
                    mapping[value] = Value(self.names[value])
                    function.params.append(mapping[value])
                    call.args.append(self.names[value])
                else:
                    mapping[value] = Value(slot)
                    function.weights[slot] = mapping[value]
            copied = Node(
                node.op,
                [None if v is None else mapping.get(v, v) for v in node.inputs],
                copy.deepcopy(node.attrs),
                node.outputs,
            )
            for value in node.outputs:
                value.node = copied
            function.nodes.append(copied)
        for param in function.params:
            if param.name not in PROGRAM_INPUTS and len(function.params) == 1:
                param.name = "x"
        function.results = results
        for node in function.nodes:
            node.inputs = [None if v is None else mapping.get(v, v) for v in node.inputs]
        name_slots(function, self.slots)
        name_values(function, self.outer.function.results[0])
        for value in results:
            self.names[value] = unique_name(value.name, set(self.names.values()))
            call.results.append(self.names[value])
        for slot in function.weights:
            constant = self.outer.constants.get(slot)
            call.weights[slot] = self._weight("", slot, self.slots, constant, self.module)
        self.result.functions[function.name] = function
        self.result.calls.append(call)

    def _layer(self, position: int, layer_call: Node) -> None:
        kind = self.kind_of[layer_call]
        number = kind.layer_calls.index(layer_call)
        record = kind.records[number]
        function = kind.raiser.function
        call = Call(function.name, [], [], path=record.path)
        for value in layer_call.inputs:
            assert value is not None
            call.args.append(self.names[value])
        for index, value in enumerate(layer_call.outputs):
            wanted = f"x{position}" if index == 0 else f"x{position}_{index}"
            self.names[value] = unique_name(wanted, set(self.names.values()))
            call.results.append(self.names[value])
        for slot in function.weights:
            constant = kind.raiser.constants.get(slot)
            if constant is not None:
                target: Any = record.module
                for part in slot.split("."):
                    target = getattr(target, part, None)
                constant = target if isinstance(target, Tensor) else constant
            call.weights[slot] = self._weight(
                record.path, slot, kind.slots, constant, record.module
            )
        call.attrs = dict(kind.attrs[number])
        self.result.calls.append(call)

    def _weight(
        self,
        path: str,
        slot: str,
        slots: SlotSources,
        constant: Tensor | None,
        module: nn.Module,
    ) -> str:
        """Add the program weight of a slot, if it is not there, and return its name."""
        store = self.result.weights
        name = f"{path}.{slot}".lstrip(".")
        if constant is not None:
            for known, known_name in self.constants:
                if known.shape == constant.shape and torch.equal(known, constant):
                    return known_name
            store.add(Weight(name, Array(constant.detach().clone()), None, True))
            self.constants.append((constant, name))
            return name
        checkpoint: list[str | None] = []

        def producer(origin: str) -> Producer:
            full = f"{path}.{origin}".lstrip(".")
            parameter = _parameter_or_buffer(self.module, full)
            made, found = self.resolve(full, parameter)
            checkpoint.append(found)
            return made

        made = slots.producer(slot, producer)
        if slot not in slots.derived and checkpoint[0] is not None:
            name = checkpoint[0]
        if name not in store:
            store.add(Weight(name, made, checkpoint[0]))
        return name


def _parameter_or_buffer(module: nn.Module, name: str) -> Tensor:
    try:
        return module.get_parameter(name)
    except AttributeError:
        return module.get_buffer(name)


def _name_params(kind: LayerKind, outer: Raiser) -> None:
    """Call the stream x, and the others as the outer graph calls them."""
    taken: set[str] = set(kind.raiser.function.weights)
    for param in kind.raiser.function.params:
        argument = kind.arguments(param)[0]
        node = argument.node
        if outer.types[argument].dtype.is_floating_point and (
            node is None or base(node.op) in ("layer", "embedding", "scale", "add", "layer_norm")
        ):
            wanted = "x"
        elif node is not None and node.op == "rope_table":
            wanted = ("cos", "sin")[argument.index]
        else:
            wanted = argument.name
        param.name = unique_name(wanted, taken)
        taken.add(param.name)
