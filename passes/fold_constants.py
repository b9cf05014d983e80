"""Computing at compile time what depends on no input and no trained weight."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from graphopt.ir.dead_code import dead_nodes, remove_newly_dead
from graphopt.ir.graph import Call, Function, Node, Program, Value, resolve_attrs, unique_name
from graphopt.ir.ops import get_op, is_aten
from graphopt.ir.ops.aten import is_random
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type
from graphopt.ir.weights import Array, Weight
from graphopt.pass_manager.contract import Context, Pass, PassResult, Skip, register_pass
from graphopt.passes.common import mentions_sizes
from graphopt.rewrite import calls_of


@register_pass
@dataclass
class FoldConstants(Pass):
    """Replace what depends only on constants by its value.

    Computed in fp64 by the reference of each op and rounded once, to the type the value has.

    Legality:

    1. Only weights marked constant are read; a trained weight is never folded into anything.
    2. Attributes that mention B, S or P are not constant, random operators neither.
    3. A result of more than `max_bytes` stays computed: it would cost more than it saves.

    Options:
        max_bytes: The largest value that is stored, in bytes.
    """

    max_bytes: Annotated[int, Field(ge=1)] = 1 << 20

    name: ClassVar[str] = "fold-constants"

    def run(self, program: Program, context: Context) -> PassResult:
        result = PassResult(program)
        per_call, _ = infer_program(program)
        types = {id(call): kinds for call, kinds in zip(program.calls, per_call, strict=True)}
        for name, calls in calls_of(program).items():
            if not calls:
                continue
            function = program.functions[name]
            dead = dead_nodes(function)
            constant = _constant_values(program, function, calls)
            for value in _frontier(function, constant):
                result.matched += len(calls)
                sizes = [types[id(call)][value] for call in calls]
                largest = max(_bytes(kind) for kind in sizes)
                if largest > self.max_bytes:
                    reason = f"its value has {largest} bytes, more than max_bytes={self.max_bytes}"
                    result.skipped.append(Skip(f"{name}: {value.name}", reason))
                    continue
                _replace_by_weight(program, function, calls, value, sizes)
                result.changed += len(calls)
            remove_newly_dead(function, dead)
        return result


def _bytes(kind: Type) -> int:
    assert isinstance(kind.bytes, int)
    return kind.bytes


def _constant_values(program: Program, function: Function, calls: list[Call]) -> set[Value]:
    """Return the values that are the same whatever the inputs are."""
    constant = {
        value
        for slot, value in function.weights.items()
        if all(program.weights[call.weights[slot]].constant for call in calls)
    }
    for node in function.nodes:
        if is_random(node) or mentions_sizes(node.attrs):
            continue
        if all(value is None or value in constant for value in node.inputs):
            constant.update(node.outputs)
    return constant


def _frontier(function: Function, constant: set[Value]) -> list[Value]:
    """Return the computed constants that something not constant reads."""
    wanted = set(function.outside_values())
    for node in function.nodes:
        if node.outputs[0] not in constant:
            wanted.update(value for value in node.inputs if value is not None)
    return [
        value
        for node in function.nodes
        for value in node.outputs
        if value in constant and value in wanted
    ]


def _replace_by_weight(
    program: Program, function: Function, calls: list[Call], value: Value, types: list[Type]
) -> None:
    """Turn `value` into a weight slot holding what each call computes for it."""
    slot = unique_name(f"folded.{value.name}", set(function.weights))
    nodes, slots = _needed(function, value)
    made: dict[Hashable, str] = {}
    for call, kind in zip(calls, types, strict=True):
        key = (tuple(call.weights[s] for s in slots), repr(sorted(call.attrs.items())))
        if key not in made:
            taken = {weight.name for weight in program.weights}
            name = unique_name(f"{function.name}.{slot}", taken)
            tensor = _evaluate(program, function, call, nodes, value).to(kind.dtype)
            program.weights.add(Weight(name, Array(tensor.contiguous()), constant=True))
            made[key] = name
        call.weights[slot] = made[key]
    folded = Value(value.name)
    function.weights[slot] = folded
    function.replace(value, folded)
    assert value.node is not None
    value.name = unique_name(value.name, function.value_names())


def _needed(function: Function, value: Value) -> tuple[list[Node], list[str]]:
    """Return the nodes and weight slots `value` is computed from."""
    wanted = {value}
    nodes: list[Node] = []
    for node in reversed(function.nodes):
        if any(output in wanted for output in node.outputs):
            nodes.append(node)
            wanted.update(operand for operand in node.inputs if operand is not None)
    return nodes[::-1], [slot for slot, weight in function.weights.items() if weight in wanted]


def _evaluate(
    program: Program, function: Function, call: Call, nodes: list[Node], wanted: Value
) -> Tensor:
    values: dict[Value, Tensor] = {}
    for slot, value in function.weights.items():
        if slot in call.weights and any(value in node.inputs for node in nodes):
            values[value] = program.weights[call.weights[slot]].load(torch.float64)
    for node in nodes:
        attrs = resolve_attrs(node, call)
        if is_aten(node.op):
            attrs["target"] = node.op
        operands = [None if value is None else values[value] for value in node.inputs]
        values.update(zip(node.outputs, get_op(node.op).reference(operands, attrs), strict=False))
    return values[wanted]
