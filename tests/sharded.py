"""A tiny decoder whose weights are split over ranks, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from programs import tiny_program

from graphopt.ir import Array, Placement, Program, Value, Weight
from graphopt.ir.ranks import FIRST_ROWS
from graphopt.ir.verify import verify

VOCAB = 96
_AXES = {
    "slopes": 0, "sinks": 0, "q_proj.": 0, "o_proj.weight": 1,
    "gate_proj.": 0, "up_proj.": 0, "down_proj.weight": 1,
    "embed.weight": 0, "lm_head.weight": 0,
}  # fmt: skip


def sharded_tiny(ranks: int = 2, **features: Any) -> Program:
    """Return `tiny_program` with a KV cache and 96 tokens, as what each of several ranks runs.

    Args:
        features: See `tiny_program`.
    """
    program = tiny_program(cache=True, vocab=VOCAB, **features)
    devices = tuple(f"cuda:{rank}" for rank in range(ranks))
    heads = next(iter(program.states.values())).heads
    copies = max(1, ranks // heads)
    keys = Placement(devices, 1, copies=copies) if heads > 1 else None
    for weight in list(program.weights):
        axis = next((axis for part, axis in _AXES.items() if part in weight.name), None)
        placement = None
        if "k_proj." in weight.name or "v_proj." in weight.name:
            placement = None if keys is None else replace(keys, axis=0)
        elif axis is not None:
            placement = Placement(devices, axis)
        elif weight.name.endswith(("o_proj.bias", "down_proj.bias")):
            placement = Placement(devices, summed=True)
        program.weights.replace(replace(weight, placement=placement))
    for state in program.states.values():
        state.placement = keys
    rows = Array(torch.arange(ranks) * (VOCAB // ranks))
    program.weights.add(Weight(FIRST_ROWS, rows, constant=True, placement=Placement(devices, 0)))
    embed, block, head = (program.functions[name] for name in ("embed", "block", "head"))
    for function in (embed, block):
        for node in list(function.nodes):
            if node.op == "embedding":
                first = function.weights["first_rows"] = Value("first_rows")
                node.op, node.inputs = "vocab_parallel_embedding", [*node.inputs, first]
            elif node.op != "linear" or node.outputs[0].name not in ("o", "down"):
                continue
            total = function.add("all_reduce", [], {"ranks": ranks}, ["total"])
            function.nodes.insert(function.nodes.index(node) + 1, function.nodes.pop())
            function.replace(node.output, total.output)
            total.inputs = [node.output]
    program.calls[0].weights["first_rows"] = FIRST_ROWS
    gathered = head.add("all_gather", head.results, {"axis": 2, "ranks": ranks}, ["all_logits"])
    head.results = gathered.outputs
    verify(program)
    return program
