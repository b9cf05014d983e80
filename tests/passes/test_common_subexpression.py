from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from small import X, function, one, programs, results, slot

from graphopt.ir import Call, In, Program
from graphopt.ir.printer import print_function
from graphopt.ir.verify import verify
from graphopt.pass_manager.contract import Context
from graphopt.passes.common_subexpression import CommonSubexpression
from graphopt.passes.dead_code import DeadCode

ONES = torch.ones(8, dtype=torch.float64)


def test_equal_nodes_and_slots_merge():
    f = function(params=("x", "y"))
    x, y = f.params
    a = f.add("mul", [x, slot(f, "w")], names=["a"]).output
    b = f.add("mul", [slot(f, "v"), x], names=["b"]).output  # other order, other slot, one weight
    c = f.add("add", [a, f.add("silu", [y], names=["s"]).output], names=["c"]).output
    d = f.add("add", [f.add("silu", [y], names=["t"]).output, b], names=["d"]).output
    f.results = [f.add("mul", [c, d], names=["e"]).output]
    program = one(f, weights={"w": ONES})
    program.calls[0].weights = {"w": "w", "v": "w"}
    before = results(program)
    result = CommonSubexpression().run(program, Context())
    verify(program)
    assert print_function(f).splitlines() == [
        "def block(x, y):",
        "    c = x * w + silu(y)",
        "    e = c * c",
        "    return e",
    ]
    assert result.record.merged == {"weight slots": 1, "nodes": 3}
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)


def test_random_numbers_and_other_attributes_are_not_equal():
    f = function()
    kind = X
    made = [
        f.add("aten.rand_like.default", [f.params[0]], {"args": [In(0)], "types": [kind]}).output
        for _ in range(2)
    ]
    scaled = [f.add("scale", [f.params[0]], {"factor": k}).output for k in (2.0, 3.0)]
    f.results = [*made, *scaled]
    assert CommonSubexpression().run(one(f), Context()).changed == 0


def test_an_absent_attribute_equals_its_default():
    f = function()
    split = [
        f.add("split_heads", [f.params[0]], attrs).output
        for attrs in ({"head_dim": 4}, {"head_dim": 4, "swap": True})
    ]
    f.results = [f.add("merge_heads", [f.add("add", split).output]).output]
    assert CommonSubexpression().run(one(f), Context()).changed == 1


def test_equal_calls_merge_and_what_they_carry():
    table, block = function("table"), function("block", ("x", "p", "q"))
    table.results = [table.add("tanh", [table.params[0]]).output]
    x, p, q = block.params
    block.results = [block.add("add", [block.add("mul", [x, p]).output, q]).output]
    program = Program("two tables", inputs={"input_ids": one(table).inputs["input_ids"], "x": X})
    program.functions = {"table": table, "block": block}
    program.calls = [
        Call("table", ["x"], ["cos"]),
        Call("table", ["x"], ["cos2"]),
        Call("block", ["x", "cos", "cos2"], ["x"]),
        Call("block", ["x", "cos", "cos2"], ["x"]),
    ]
    program.outputs = ["x"]
    before = results(program)
    result = CommonSubexpression().run(program, Context())
    verify(program)
    assert [(c.function, c.args, c.results) for c in program.calls] == [
        ("table", ["x"], ["cos"]),
        ("block", ["x", "cos"], ["x"]),
        ("block", ["x", "cos"], ["x"]),
    ]
    assert result.record.merged == {"calls": 1, "parameters": 2}
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)


def test_a_name_that_is_rebound_between_equal_calls_gets_out_of_the_way():
    f = function("f", ("x",))
    f.results = [f.add("tanh", [f.params[0]]).output]
    program = Program("rebound", inputs={"input_ids": one(f).inputs["input_ids"], "x": X})
    program.functions = {"f": f}
    program.calls = [
        Call("f", ["x"], ["t"]),
        Call("f", ["t"], ["t"]),  # t is now another value
        Call("f", ["x"], ["u"]),  # equal to the first call
        Call("f", ["u"], ["v"]),  # equal to the second
    ]
    program.outputs = ["t", "u", "v"]
    before = results(program)
    CommonSubexpression().run(program, Context())
    verify(program)
    assert program.outputs == ["t", "u", "v"]
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_results_stay_and_a_second_run_finds_nothing(program):
    before, outputs = results(program), list(program.outputs)
    CommonSubexpression().run(program, Context())
    verify(program)
    assert program.outputs == outputs
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)
    text = str(program)
    assert CommonSubexpression().run(program, Context()).changed == 0
    assert str(program) == text
    DeadCode().run(program, Context())
    torch.testing.assert_close(results(program), before, rtol=0, atol=0)
