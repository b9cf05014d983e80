from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from small import check_text, function, one, programs, results, slot

from graphopt.ir import Array, Call, Weight
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context
from graphopt.passes.dead_code_elimination import DeadCodeElimination

ONES = torch.ones(8, dtype=torch.float64)

BEFORE = """
program small
def block(x, y):
    waste = y * unused
    kept = x * used
    spare = tanh(y)
    return kept, spare
def orphan():
    return
run(input_ids: i64[B,S], x: f64[B,S,8], y: f64[B,S,8]):
    dropped, r1 = block[stale=3](x, y)
    r0, r1 = block[stale=3](x, y)
    return r0
weights:
    used: f64[8]
    unused: f64[8]
"""
AFTER = """
program small
def block(x):
    kept = x * used
    return kept
run(input_ids: i64[B,S], x: f64[B,S,8], y: f64[B,S,8]):
    r0 = block(x)
    return r0
weights:
    used: f64[8]
"""


def test_everything_nothing_reads_goes():
    """Inputs stay: they are the contract with runtimes."""
    result = check_text(DeadCodeElimination(), BEFORE, AFTER)
    assert result.record.removed == {
        "calls": 1,
        "results": 1,
        "nodes": 2,
        "weight slots": 1,
        "parameters": 1,
        "attributes": 1,
        "functions": 1,
        "weights": 1,
    }


def test_a_result_that_one_call_needs_stays_for_all():
    f = function()
    f.results = [
        f.add("tanh", [f.params[0]]).output,
        f.add("silu", [f.params[0]]).output,
    ]
    program = one(f)
    program.calls.append(Call("block", ["r0"], ["x", "y"]))
    program.outputs = ["y"]
    assert DeadCodeElimination().run(program, Context()).changed == 0


def test_a_weight_only_an_unread_call_uses_goes():
    f = function()
    f.results = [f.add("mul", [f.params[0], slot(f, "w")]).output]
    program = one(f, weights={"w": ONES})
    program.weights.add(Weight("other", Array(ONES)))
    program.calls.append(Call("block", ["r0"], ["nobody"], {"w": "other"}))
    DeadCodeElimination().run(program, Context())
    assert [weight.name for weight in program.weights] == ["w"]
    assert len(program.calls) == 1


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_results_stay_and_a_second_run_finds_nothing(program):
    before = results(program)
    DeadCodeElimination().run(program, Context())
    verify(program)
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)
    text = str(program)
    assert DeadCodeElimination().run(program, Context()).changed == 0
    assert str(program) == text
