"""What a prompt takes of a model before and after carving, counted."""

from __future__ import annotations

from graphopt.ir.cost import total_cost, weight_products
from graphopt.ir.graph import Program
from graphopt.ir.types import B, P, S, evaluate
from graphopt.passes.carve_moe.record import Work

PROMPT = 128
"""Tokens of the prompt, as in CMoE's table 7."""


def work_of(given: Program, carved: Program) -> Work:
    """Return what a prompt of `PROMPT` tokens takes, of the model as given and carved."""
    sizes = {B: 1, S: PROMPT, P: 0}
    flops, products = zip(
        *(
            (evaluate(total_cost(model).flops, sizes), evaluate(weight_products(model), sizes))
            for model in (given, carved)
        ),
        strict=True,
    )
    return Work(tokens=PROMPT, flops=flops, weight_products=products)
