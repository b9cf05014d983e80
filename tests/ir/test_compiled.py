"""Compiled functions give what the interpreter gives, with gradients, and compile once."""

from __future__ import annotations

import shutil

import pytest
import torch
from programs import tiny_program

from graphopt.execute import compiled
from graphopt.execute.interpreter import Runner, complete_inputs, run_function
from graphopt.ir.blocks import find_blocks
from graphopt.ir.types import B, P, S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ here"),
]


def test_two_calls_of_one_function_share_a_compilation_and_agree_with_the_interpreter(monkeypatch):
    monkeypatch.setattr(compiled, "_made", {})
    program = tiny_program(layers=2)
    runner = Runner(program)
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    values = complete_inputs({"input_ids": ids})
    values["attention_mask"] = None
    sizes = {B: 2, S: 12, P: 0}
    blocks = {block.position for block in find_blocks(program)}
    tested = 0
    for position, call in enumerate(program.calls):
        function = program.functions[call.function]
        args = [values[name] for name in call.args]
        weights = runner.call_weights(call)
        values.update(
            zip(call.results, run_function(function, call, args, weights, sizes)[0], strict=True)
        )
        if position not in blocks:
            continue
        tested += 1
        found = []
        for run in (lambda *all: run_function(*all)[0], compiled.run_compiled):
            leaves = {slot: value.clone().requires_grad_() for slot, value in weights.items()}
            (result,) = run(function, call, args, leaves, sizes)
            result.square().mean().backward()
            found.append([result.detach(), *(leaf.grad for leaf in leaves.values())])
        for expected, given in zip(*found, strict=True):
            # fp32 sums of some 50 terms in another order.
            assert float((expected - given).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert tested == 2 and len(compiled._made) == 1
