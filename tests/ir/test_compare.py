"""Programs that say the same in another order are one, and others are not."""

from __future__ import annotations

import random

import pytest
from families import captured, cases

from graphopt.execute.interpreter import Runner
from graphopt.ir.compare import first_difference, in_order_of_use
from graphopt.ir.graph import Program


def shuffled(program: Program, seed: int) -> Program:
    """Return a copy with nodes, parameters and results in another order, and sums swapped."""
    program, draw = program.copy(), random.Random(seed)
    for function in program.functions.values():
        left, ready = list(function.nodes), []
        while left:
            made = {value for node in ready for value in node.outputs}
            able = [n for n in left if all(v is None or v.node is None or v in made
                                           for v in n.inputs)]  # fmt: skip
            node = draw.choice(able)
            left.remove(node)
            ready.append(node)
            if node.op in ("add", "mul") and draw.random() < 0.5:
                node.inputs.reverse()
        function.nodes = ready
        calls = [call for call in program.calls if call.function == function.name]
        for names, values in (("args", function.params), ("results", function.results)):
            order = draw.sample(range(len(values)), len(values))
            values[:] = [values[index] for index in order]
            for call in calls:
                setattr(call, names, [getattr(call, names)[index] for index in order])
    return program


@pytest.mark.slow
def test_one_order_whatever_it_was_and_the_same_logits():
    for family in ("llama", "gemma3_text"):
        _, program = captured(family)
        case = cases((7,))[0]
        want = in_order_of_use(program)
        for seed in range(5):
            other = shuffled(program, seed)
            assert first_difference(other, program) is not None
            assert first_difference(in_order_of_use(other), want) is None
        expected = Runner(program).logits(case.inputs)
        found = Runner(want).logits(case.inputs)
        assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


def test_what_differs_differs_in_any_order():
    _, program = captured("llama")
    other = program.copy()
    for node in other.functions["block"].nodes:
        if node.op == "silu":
            node.op = "relu"
    difference = first_difference(in_order_of_use(other), in_order_of_use(program))
    assert difference is not None and "relu" in difference
