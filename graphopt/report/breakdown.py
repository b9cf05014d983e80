"""Where parameters and FLOPs are: embedding, attention, feed-forward, norms, head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import sympy

from graphopt.ir.graph import Function, Node, Program, Value, resolve_attrs
from graphopt.ir.ops import get_op
from graphopt.ir.ops.attention import ATTENTIONS
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import B, Dim, T, Type, evaluate, numel

PARTS = ("embed", "attention", "ffn", "norm", "head")
_NORMS = ("rms_norm", "layer_norm")


@dataclass
class BlockCost:
    """The cost of one call: its parameters and FLOPs, by part.

    Attributes:
        name: Module path, or the function's name.
        parameters: Trained parameters; a tied weight counts in the first call that reads it.
        flops: In B, S and P; a multiply-add counts as two.
    """

    name: str
    parameters: dict[str, int] = field(default_factory=dict)
    flops: dict[str, sympy.Expr] = field(default_factory=dict)


def part_of_nodes(function: Function) -> dict[Node, str]:
    """Return which part every node belongs to, by dataflow.

    In a function with attention: what attention is computed from and what its result goes
    through, up to the sums into the residual stream, is `attention`; the rest is `ffn`. A
    function without attention is `embed` if it looks up tokens and else `head`.
    """
    attentions = [node for node in function.nodes if node.op in ATTENTIONS]
    if attentions:
        inside = _around(function, attentions)
        parts = {node: "attention" if node in inside else "ffn" for node in function.nodes}
    else:
        look_ups = ("embedding", "vocab_parallel_embedding")
        looks_up = any(node.op in look_ups for node in function.nodes)
        parts = dict.fromkeys(function.nodes, "embed" if looks_up else "head")
    parts.update((node, "norm") for node in function.nodes if node.op in _NORMS)
    return parts


def _around(function: Function, attentions: Iterable[Node]) -> set[Node]:
    weights = set(function.weights.values())
    readers = function.uses()

    def is_residual(node: Node) -> bool:
        return node.op == "add" and not weights & set(node.inputs)

    inside: set[Node] = set()
    before = list(attentions)
    while before:
        node = before.pop()
        if node in inside or is_residual(node):
            continue
        inside.add(node)
        before += [v.node for v in node.inputs if v is not None and v.node is not None]
    after = [user for node in attentions for v in node.outputs for user, _ in readers[v]]
    while after:
        node = after.pop()
        if node in inside or is_residual(node):
            continue
        inside.add(node)
        after += [user for v in node.outputs for user, _ in readers[v]]
    return inside


def breakdown(program: Program) -> list[BlockCost]:
    """Return parameters and FLOPs of every call, in call order."""
    per_call, _ = infer_program(program)
    parts = {name: part_of_nodes(function) for name, function in program.functions.items()}
    flops: dict[tuple[int, str], dict[str, sympy.Expr]] = {}
    blocks: list[BlockCost] = []
    counted: set[str] = set()
    for call, types in zip(program.calls, per_call, strict=True):
        function = program.functions[call.function]
        block = BlockCost(call.path or call.function)
        key = (id(types), repr(sorted(call.attrs.items())))
        if key not in flops:
            flops[key] = {}
            for node in function.nodes:
                operands = [None if v is None else types[v] for v in node.inputs]
                outputs = [types[v] for v in node.outputs]
                cost = get_op(node.op).flops(operands, outputs, resolve_attrs(node, call))
                _add(flops[key], parts[call.function][node], sympy.sympify(cost))
        block.flops = flops[key]
        for slot, name in call.weights.items():
            weight = program.weights[name]
            if name in counted or weight.constant:
                continue
            counted.add(name)
            part = _part_of_slot(function.weights[slot], function, parts[call.function])
            block.parameters[part] = block.parameters.get(part, 0) + weight.numel
        blocks.append(block)
    return blocks


def _add(totals: dict[str, sympy.Expr], part: str, cost: sympy.Expr) -> None:
    totals[part] = totals.get(part, sympy.Integer(0)) + cost


def _part_of_slot(value: Value, function: Function, parts: Mapping[Node, str]) -> str:
    reader = next((node for node in function.nodes if value in node.inputs), None)
    return parts[reader] if reader is not None else "ffn"


def kv_cache_bytes(program: Program, itemsize: int | None = None) -> Dim:
    """Return the bytes of keys and values for B sequences of P + S tokens.

    What KV policies remember counts too.

    Args:
        itemsize: Bytes of a key's or value's element; None for the activations' own dtype. What
            policies remember keeps its own.
    """
    if program.states:
        states = program.states.values()
        kept = (kind.bytes for state in states for kind in state.policy_types_of(T).values())
        held = (state.nbytes(T, itemsize) for state in states)
        return sum(map(sympy.sympify, (*held, *kept)), sympy.Integer(0))
    per_call, _ = infer_program(program)
    total: Dim = sympy.Integer(0)
    for call, types in zip(program.calls, per_call, strict=True):
        for node in program.functions[call.function].nodes:
            if node.op in ATTENTIONS:
                k, v = (types[operand] for operand in node.inputs[1:3] if operand is not None)
                total = total + _token_bytes(k, itemsize) + _token_bytes(v, itemsize)
    return total * B * T


def _token_bytes(kind: Type, itemsize: int | None) -> Dim:
    heads, size = kind.shape[1], kind.shape[3]
    return numel((heads, size)) * (itemsize or kind.dtype.itemsize)


def evaluate_cost(value: Dim, sizes: Mapping[sympy.Symbol, int]) -> int:
    """Return a symbolic size or cost for given B, S and P, rounded to whole units."""
    if isinstance(value, int):
        return value
    result = sympy.sympify(value).subs(dict(sizes))
    return evaluate(sympy.floor(result), {})
