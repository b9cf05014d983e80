"""Symbolic cost: FLOPs and bytes as expressions in B, S and P."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import sympy

from graphopt.ir.graph import Call, Program, Value, resolve_attrs
from graphopt.ir.ops import get_op
from graphopt.ir.shapes import infer_program
from graphopt.ir.types import Type

Expr: TypeAlias = sympy.Expr


@dataclass
class Cost:
    """Arithmetic and traffic of a part of the program.

    Attributes:
        flops: Floating-point operations; a multiply-add counts as two.
        weight_bytes: Weights read once, in the checkpoint's dtype.
        activation_bytes: Operands read and results written, every op on its own.
        by_op: FLOPs by op name.
    """

    flops: Expr = field(default_factory=lambda: sympy.Integer(0))
    weight_bytes: Expr = field(default_factory=lambda: sympy.Integer(0))
    activation_bytes: Expr = field(default_factory=lambda: sympy.Integer(0))
    by_op: dict[str, Expr] = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        by_op = dict(self.by_op)
        for name, flops in other.by_op.items():
            by_op[name] = by_op.get(name, sympy.Integer(0)) + flops
        return Cost(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            by_op,
        )

    @property
    def bytes(self) -> Expr:
        return self.weight_bytes + self.activation_bytes


_LOOK_UPS = ("embedding", "vocab_parallel_embedding")
"""Ops that read some rows of a table."""


def call_cost(program: Program, call: Call, types: dict[Value, Type]) -> Cost:
    """Return the cost of one call, given the types of its values."""
    cost = Cost()
    function = program.functions[call.function]
    weights = set(function.weights.values())
    for node in function.nodes:
        op, attrs = get_op(node.op), resolve_attrs(node, call)
        operands = [None if v is None else types[v] for v in node.inputs]
        outputs = [types[v] for v in node.outputs]
        flops = sympy.sympify(op.flops(operands, outputs, attrs))
        cost.flops += flops
        moved = sympy.sympify(op.bytes(operands, outputs, attrs))
        for value in node.inputs:
            if value in weights and node.op not in _LOOK_UPS:
                moved -= types[value].bytes
                cost.weight_bytes += types[value].bytes
        cost.activation_bytes += moved
        cost.by_op[node.op] = cost.by_op.get(node.op, sympy.Integer(0)) + flops
    return cost


def program_costs(program: Program) -> list[Cost]:
    """Return the cost of every call, in call order; equal calls are computed once."""
    per_call, _ = infer_program(program)
    seen: dict[tuple[int, str], Cost] = {}
    costs: list[Cost] = []
    for call, types in zip(program.calls, per_call, strict=True):
        key = (id(types), repr(sorted(call.attrs.items())))
        if key not in seen:
            seen[key] = call_cost(program, call, types)
        costs.append(seen[key])
    return costs


def total_cost(program: Program) -> Cost:
    """Return the cost of the whole program."""
    total = Cost()
    for cost in program_costs(program):
        total = total + cost
    return total


def weight_products(program: Program) -> Expr:
    """Return the multiply-adds of products with weights, experts that are not run left out.

    Scores and sums of attention are no products with weights. Source: CMoE, arXiv 2502.04416,
    table 7, counts so.
    """
    total: Expr = sympy.Integer(0)
    for call, types in zip(program.calls, infer_program(program)[0], strict=True):
        for node in program.functions[call.function].nodes:
            if node.op == "linear":
                x, weight = node.inputs[0], node.inputs[1]
                assert x is not None and weight is not None
                rows = types[x].numel / types[x].shape[-1]
                total += rows * types[weight].numel
            elif node.op == "experts":
                x, gates, up, down, gate = node.inputs[:5]
                assert x is not None and gates is not None
                rows = types[x].numel / types[x].shape[-1]
                attrs = resolve_attrs(node, call)
                active = attrs.get("mean_active_experts") or attrs["active"]
                share = sympy.Rational(active, types[gates].shape[-1])
                total += rows * share * sum(types[v].numel for v in (up, down, gate) if v)
    return sympy.expand(total)
