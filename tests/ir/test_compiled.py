"""Compiled functions give what the interpreter gives, with gradients, and compile once.

What is made here is the graph and its gradients; turning them into kernels is torch's own work,
and takes a minute for a block. So a block is compiled up to there; what torch's own compiler makes
of it, and of a small function, is exhaustive.
"""

from __future__ import annotations

import shutil

import pytest
import setuptools  # noqa: F401  # inductor imports it, which fails where another distutils was before
import torch
from compiling import with_backend
from programs import tiny_program

from graphopt.execute import compiled
from graphopt.execute.function_run import run_function
from graphopt.execute.interpreter import Runner, complete_inputs
from graphopt.ir.blocks import find_blocks
from graphopt.ir.graph import Call, Function, Value
from graphopt.ir.types import B, P, S

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ here")


def check(function, call, args, weights, sizes):
    """Compare results and gradients of a compiled call with those of the interpreter."""
    found = []
    for run in (lambda *all: run_function(*all)[0], compiled.run_compiled):
        leaves = {slot: value.clone().requires_grad_() for slot, value in weights.items()}
        (result,) = run(function, call, args, leaves, sizes)
        result.square().mean().backward()
        found.append([result.detach(), *(leaf.grad for leaf in leaves.values())])
    for expected, given in zip(*found, strict=True):
        # fp32 sums of some 50 terms in another order.
        assert float((expected - given).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.exhaustive, needs_compiler])],
)
def test_two_calls_of_one_function_share_a_compilation_and_agree_with_the_interpreter(
    backend, monkeypatch
):
    with_backend(monkeypatch, backend)
    program = tiny_program(layers=2)
    runner = Runner(program)
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    values = complete_inputs({"input_ids": ids})
    values["attention_mask"] = None
    sizes = {B: 2, S: 12, P: 0}
    blocks = {block.position for block in find_blocks(program)}
    for position, call in enumerate(program.calls):
        function = program.functions[call.function]
        args = [values[name] for name in call.args]
        weights = runner.call_weights(call)
        values.update(
            zip(call.results, run_function(function, call, args, weights, sizes)[0], strict=True)
        )
        if position in blocks:
            check(function, call, args, weights, sizes)
    assert len(blocks) == 2 and len(compiled._made) == 1


@pytest.mark.exhaustive
@needs_compiler
def test_torchs_own_compiler_takes_what_it_is_given(monkeypatch):
    with_backend(monkeypatch, "inductor")
    function = Function("gate", [Value("x")], {"weight": Value("weight")})
    product = function.add("linear", [function.params[0], function.weights["weight"]]).output
    function.results = [function.add("silu", [product]).output]
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((2, 3, 8), (6, 8)))
    call = Call("gate", ["x"], ["y"], {"weight": "weight"})
    check(function, call, [x], {"weight": weight}, {B: 2, S: 3, P: 0})
    assert len(compiled._made) == 1
