from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from small import function, one, programs, results, slot

from graphopt.ir import Array, Call, Function, Weight
from graphopt.ir.printer import print_function
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context
from graphopt.passes.dead_code import DeadCode

ONES = torch.ones(8, dtype=torch.float64)


def test_everything_nothing_reads_goes():
    f = function(params=("x", "y"))
    used, unused = slot(f, "used"), slot(f, "unused")
    f.add("mul", [f.params[1], unused], names=["waste"])
    kept = f.add("mul", [f.params[0], used], names=["kept"]).output
    spare = f.add("tanh", [f.params[1]], names=["spare"]).output
    f.results = [kept, spare]
    program = one(f, weights={"used": ONES, "unused": ONES}, attrs={"stale": 3})
    program.functions["orphan"] = Function("orphan")
    program.calls.insert(0, Call("block", ["x", "y"], ["dropped", "r1"], {"used": "used",
                                 "unused": "unused"}, {"stale": 3}))  # fmt: skip
    program.outputs = ["r0"]
    before = results(program)
    result = DeadCode().run(program, Context())
    verify(program)
    assert print_function(f).splitlines() == [
        "def block(x):",
        "    kept = x * used",
        "    return kept",
    ]
    assert list(program.functions) == ["block"]
    assert [weight.name for weight in program.weights] == ["used"]
    assert [(c.args, c.results, c.attrs) for c in program.calls] == [(["x"], ["r0"], {})]
    assert set(program.inputs) == {"input_ids", "x", "y"}  # the contract with runtimes stays
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
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)


def test_a_result_that_one_call_needs_stays_for_all():
    f = function()
    f.results = [
        f.add("tanh", [f.params[0]]).output,
        f.add("silu", [f.params[0]]).output,
    ]
    program = one(f)
    program.calls.append(Call("block", ["r0"], ["x", "y"]))
    program.outputs = ["y"]
    assert DeadCode().run(program, Context()).changed == 0


def test_a_weight_only_an_unread_call_uses_goes():
    f = function()
    f.results = [f.add("mul", [f.params[0], slot(f, "w")]).output]
    program = one(f, weights={"w": ONES})
    program.weights.add(Weight("other", Array(ONES)))
    program.calls.append(Call("block", ["r0"], ["nobody"], {"w": "other"}))
    DeadCode().run(program, Context())
    assert [weight.name for weight in program.weights] == ["w"]
    assert len(program.calls) == 1


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_results_stay_and_a_second_run_finds_nothing(program):
    before = results(program)
    DeadCode().run(program, Context())
    verify(program)
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)
    text = str(program)
    assert DeadCode().run(program, Context()).changed == 0
    assert str(program) == text
