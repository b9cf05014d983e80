"""Tiny programs with caches of every layout, selected pages and all results of attention."""

from __future__ import annotations

from typing import Any

import torch
from programs import tiny_program

from graphopt.execute.interpreter import Runner
from graphopt.ir import Array, B, In, KVLayout, Node, Program, S, Type, Value, Weight
from graphopt.ir.ops.attention import SELECTED
from graphopt.ir.relayout import with_layouts
from graphopt.ir.verify import verify

LISTS = [[0, 2, -1], [3, 1, 99]]
"""For each of two key heads: in any order, one that names no page, one behind the last key."""


def _attention(program: Program) -> Node:
    return next(n for n in program.functions["block"].nodes if n.op == "attention")


def selecting(page: int, layout: KVLayout, lists: Any = LISTS, **features: Any) -> Program:
    """A decoder whose key heads read the pages of constant lists."""
    program = tiny_program(cache=True, **{"kv_heads": 2, **features})
    lists = torch.tensor(lists)[None]
    program.weights.add(Weight("selected", Array(lists), constant=True))
    function, node = program.functions["block"], _attention(program)
    value = function.weights["selected_blocks"] = Value("selected_blocks")
    for call in program.calls:
        if call.function == "block":
            call.weights["selected_blocks"] = "selected"
    node.inputs += [None] * (SELECTED + 1 - len(node.inputs))
    node.inputs[SELECTED] = value
    node.attrs["page"] = page
    program = with_layouts(program, dict.fromkeys(program.states, layout))
    verify(program)
    return program


def gating(program: Program, page_max: int | None) -> Program:
    """The program, each output of attention times sigmoids of its log-sum-exp and page maxima."""
    function, node = program.functions["block"], _attention(program)
    after = function.nodes[function.nodes.index(node) + 1]
    heads = 4
    node.attrs["lse"] = True
    lse = _output(node, "lse")
    column = Type((B, heads, S, 1), torch.float32)
    gates = [("aten.unsqueeze.default", lse, [In(0), -1])]
    if page_max is not None:
        node.attrs["page_max"] = page_max
        gates.append(("aten.amax.default", _output(node, "top"), [In(0), [-1], True]))
    gated = node.outputs[0]
    for op, value, args in gates:
        attrs = {"args": args, "types": [column]}
        wide = function.add(op, [value], attrs, ["wide"], before=after).output
        gate = function.add("sigmoid", [wide], names=["gate"], before=after).output
        gated = function.add("mul", [gated, gate], names=["gated"], before=after).output
    after.inputs = [gated if value is node.outputs[0] else value for value in after.inputs]
    verify(program)
    return program


def _output(node: Node, name: str) -> Value:
    node.outputs.append(Value(name, node, len(node.outputs)))
    return node.outputs[-1]


SIZES = {"head_dim": 32, "heads": 4, "kv_heads": 2, "window": 6, "cache": True}
RING, PAGES = KVLayout("ring", 8), KVLayout("paged", 16)
LAYOUTS = {
    "contiguous": {},
    "ring": {"kv.0": RING},
    "ring of the window": {"kv.0": KVLayout("ring", 6), "kv.1": KVLayout("paged", 5)},
    "pages": {"kv.0": PAGES, "kv.1": PAGES},
    "ring and pages": {"kv.0": RING, "kv.1": PAGES},
}
TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [1, 2, 3, 4], list(range(30, 49))]

GENERAL = {
    "log-sum-exp, ring": lambda: gating(
        with_layouts(tiny_program(layers=1, **SIZES), {"kv.0": RING}), None
    ),
    "log-sum-exp and page maxima": lambda: gating(
        with_layouts(tiny_program(**SIZES), LAYOUTS["pages"]), 16
    ),
    "selected pages": lambda: selecting(8, KVLayout("paged", 8), head_dim=32, layers=1),
    "selected pages and their maxima": lambda: gating(
        selecting(8, KVLayout("paged", 8), head_dim=32, layers=1), 8
    ),
}


def errors(program: Program, module: Any, model: Any, steps: int, *, grows: bool = True) -> float:
    """The largest error of a logit, over the largest logit: unequal texts, in two ways.

    By a decoder whose caches have fixed room, and where it `grows` by one that does, padded in
    front.
    """
    runner = Runner(program, dtype=torch.float64, mode="reference")
    decoder = module.Decoder(model, 32, batch=len(TEXTS))
    texts, found = [list(text) for text in TEXTS], []
    following = decoder.start(texts)
    found.append(decoder.logits.double().cpu())
    for _ in range(steps):
        for text, token in zip(texts, following, strict=True):
            text.append(token)
        following = decoder.step()
        found.append(decoder.logits.double().cpu())
    errors = []
    for row, text in enumerate(texts):
        exact = runner.logits({"input_ids": torch.tensor([text])})[0, -1 - steps :]
        logits = torch.stack([step[row] for step in found])
        errors.append(float((logits - exact).abs().max() / exact.abs().max()))
    if not grows:
        return max(errors)
    longest, device = max(map(len, texts)), decoder.token.device
    pads = [longest - len(text) for text in texts]
    ids = torch.tensor([[0] * pad + text for pad, text in zip(pads, texts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    (exact,), _ = runner.run({"input_ids": ids, "attention_mask": mask})
    ids, mask, cache = ids.to(device), mask.to(device), None
    with torch.no_grad():
        for start, end in ((0, longest - 3), (longest - 3, longest - 2), (longest - 2, longest)):
            logits, cache = model(ids[:, start:end], mask[:, :end], cache=cache)
    error = (logits[:, -1].double().cpu() - exact[:, -1]).abs().max()
    return max(*errors, float(error / exact.abs().max()))
